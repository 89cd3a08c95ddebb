package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Error is a command that the monitor refused.
type Error struct {
	Command string
	Class   string // "GenericError", "DeviceNotFound", "CommandNotFound", "DeviceNotActive"
	Desc    string
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s (%s)", e.Command, e.Desc, e.Class) }

var (
	// ErrNotQMP means that what listens on the socket greets as no QMP monitor does.
	ErrNotQMP = errors.New("not a QMP monitor")
	// ErrClosed means that the connection has ended: the process is gone or has
	// closed its monitor.
	ErrClosed = errors.New("the monitor's connection has ended")
)

// Args are a command's arguments, or any object of the protocol.
type Args = map[string]any

// Event is something that the monitor told by itself.
type Event struct {
	Name string
	Data json.RawMessage
	At   time.Time
}

// keepEvents bounds how many events a Monitor remembers for those who ask late.
const keepEvents = 256

// longest bounds one message, in bytes: answers about many block nodes are long.
const longest = 16 << 20

// Monitor is a connection to one monitor. It is safe for concurrent use;
// commands are sent one after the other, as the protocol has it.
type Monitor struct {
	conn    net.Conn
	Version string // "7.2.22"

	command sync.Mutex // one at a time

	mu      sync.Mutex
	next    uint64
	answers map[uint64]chan message
	events  []Event
	seen    uint64        // events that came so far
	told    chan struct{} // closed and replaced at each event
	err     error         // why the connection ended
}

type message struct {
	QMP *struct {
		Version struct {
			QEMU struct{ Major, Minor, Micro int }
		}
	}
	Return json.RawMessage `json:"return"`
	Error  *struct{ Class, Desc string }
	ID     *uint64
	Event  string
	Data   json.RawMessage
	Stamp  struct{ Seconds, Microseconds int64 } `json:"timestamp"`
}

// Dial connects to a monitor's unix socket and negotiates. It ends when ctx does:
// a monitor that has another client answers nobody else. fs.ErrNotExist and
// ECONNREFUSED are in the chain where nobody listens.
func Dial(ctx context.Context, socket string) (*Monitor, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	return Open(ctx, conn)
}

// Open is Dial on a connection that is there, which it takes over: it is closed
// when that fails.
func Open(ctx context.Context, conn net.Conn) (*Monitor, error) {
	m := &Monitor{conn: conn, answers: map[uint64]chan message{}, told: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	r := bufio.NewReaderSize(conn, 64<<10)
	if err := m.greet(r); err != nil {
		return nil, errors.Join(cause(ctx, err), conn.Close())
	}
	go m.read(r)
	if _, err := m.Do(ctx, "qmp_capabilities", nil); err != nil {
		return nil, errors.Join(cause(ctx, err), m.Close())
	}
	return m, nil
}

// cause puts the context's end in the place of the time-out that it made.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("the monitor does not answer: %w", context.Cause(ctx))
	}
	return err
}

func (m *Monitor) greet(r *bufio.Reader) error {
	text, err := line(r)
	if err != nil {
		return err
	}
	var g message
	if json.Unmarshal(text, &g) != nil || g.QMP == nil {
		return ErrNotQMP
	}
	v := g.QMP.Version.QEMU
	m.Version = fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
	return nil
}

// line reads one message; they end with CR LF.
func line(r *bufio.Reader) ([]byte, error) {
	var text []byte
	for {
		part, err := r.ReadSlice('\n')
		text = append(text, part...)
		switch {
		case err == nil:
			return text, nil
		case len(text) > longest:
			return nil, fmt.Errorf("%w: a message of more than %d bytes", ErrNotQMP, longest)
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

func (m *Monitor) read(r *bufio.Reader) {
	for {
		text, err := line(r)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				err = nil
			}
			m.end(err)
			return
		}
		var got message
		if err := json.Unmarshal(text, &got); err != nil {
			m.end(fmt.Errorf("%w: %w", ErrNotQMP, err))
			return
		}
		m.take(got)
	}
}

func (m *Monitor) take(got message) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case got.Event != "":
		m.events = append(m.events, Event{got.Event, got.Data, time.Unix(got.Stamp.Seconds, got.Stamp.Microseconds*1000)})
		if over := len(m.events) - keepEvents; over > 0 {
			m.events = m.events[over:]
		}
		m.seen++
		close(m.told)
		m.told = make(chan struct{})
	case got.ID != nil && m.answers[*got.ID] != nil:
		m.answers[*got.ID] <- got
		delete(m.answers, *got.ID)
	}
}

func (m *Monitor) end(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = ErrClosed
	if err != nil {
		m.err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	for id, answer := range m.answers {
		close(answer)
		delete(m.answers, id)
	}
	close(m.told)
	m.told = make(chan struct{})
}

// Do sends a command and gives what it returns. *Error when it was refused,
// ErrClosed when the connection ends before the answer: whether the command was
// carried out is then not known, nor is it when ctx ends first.
func (m *Monitor) Do(ctx context.Context, command string, args Args) (json.RawMessage, error) {
	m.command.Lock()
	defer m.command.Unlock()
	m.mu.Lock()
	if m.err != nil {
		defer m.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", command, m.err)
	}
	m.next++
	id := m.next
	answer := make(chan message, 1)
	m.answers[id] = answer
	m.mu.Unlock()

	request := Args{"execute": command, "id": id}
	if args != nil {
		request["arguments"] = args
	}
	text, err := json.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	if err := m.write(ctx, text); err != nil {
		m.forget(id)
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	select {
	case got, ok := <-answer:
		switch {
		case !ok:
			return nil, fmt.Errorf("%s: %w", command, m.ended())
		case got.Error != nil:
			return nil, &Error{Command: command, Class: got.Error.Class, Desc: got.Error.Desc}
		}
		return got.Return, nil
	case <-ctx.Done():
		m.forget(id)
		return nil, fmt.Errorf("%s: no answer: %w", command, context.Cause(ctx))
	}
}

func (m *Monitor) write(ctx context.Context, text []byte) error {
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetWriteDeadline(time.Unix(1, 0)) })
	_, err := m.conn.Write(append(text, '\n'))
	if !stop() { // a message that may be cut in the middle: nothing more can be sent
		return errors.Join(context.Cause(ctx), m.Close())
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return nil
}

func (m *Monitor) forget(id uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.answers, id)
}

func (m *Monitor) ended() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Mark is a place in the stream of events: take it before the command whose event
// is to be waited for.
func (m *Monitor) Mark() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen
}

// Wait gives the first event after a mark that fits, also one that has come
// already (of the last 256). It ends with ctx, or ErrClosed with the connection.
func (m *Monitor) Wait(ctx context.Context, mark uint64, fits func(Event) bool) (Event, error) {
	for {
		m.mu.Lock()
		first := m.seen - uint64(len(m.events))
		for i, e := range m.events {
			if first+uint64(i) >= mark && fits(e) {
				m.mu.Unlock()
				return e, nil
			}
		}
		mark = max(mark, m.seen)
		told, err := m.told, m.err
		m.mu.Unlock()
		if err != nil {
			return Event{}, err
		}
		select {
		case <-told:
		case <-ctx.Done():
			return Event{}, fmt.Errorf("no event: %w", context.Cause(ctx))
		}
	}
}

// Close ends the connection; the process behind it is not touched.
func (m *Monitor) Close() error {
	err := m.conn.Close()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

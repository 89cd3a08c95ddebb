package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
)

// ErrLost means that the guest does not answer any more.
var ErrLost = errors.New("the guest's agent is gone")

// ExitError is a command that ran in the guest and failed.
type ExitError struct {
	Args   []string
	Result Result
	Output string // its end
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("in the guest: %s: code %d %s: %s", strings.Join(e.Args, " "), e.Result.Code, e.Result.Error, strings.TrimSpace(e.Output))
}

// Client is the outside. It is safe for concurrent use.
type Client struct {
	conn net.Conn
	send sync.Mutex

	mu    sync.Mutex
	next  uint32
	calls map[uint32]*call
	err   error
	hello chan struct{} // closed at the first sign of life
	gone  chan struct{} // closed at the connection's end
}

type call struct {
	out, errs io.Writer
	done      chan Result // closed without one when the guest is lost
}

// Dial connects to the socket behind the guest's port and waits for the agent.
func Dial(ctx context.Context, socket string) (*Client, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: conn, calls: map[uint32]*call{}, hello: make(chan struct{}), gone: make(chan struct{})}
	go c.read()
	// A guest that was started from a saved state has said hello to another one.
	if err := c.write(frame{kind: hello}); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	select {
	case <-c.hello:
		return c, nil
	case <-c.gone:
		return nil, errors.Join(c.err, c.Close())
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("%w: it never answered: %w", ErrLost, context.Cause(ctx)), c.Close())
	}
}

func (c *Client) write(f frame) error {
	c.send.Lock()
	defer c.send.Unlock()
	return f.write(c.conn)
}

func (c *Client) read() {
	r := bufio.NewReaderSize(c.conn, mostPayload)
	for {
		f, err := readFrame(r)
		if err != nil {
			c.end(err)
			return
		}
		c.take(f)
	}
}

func (c *Client) take(f frame) {
	c.mu.Lock()
	one := c.calls[f.id]
	if f.kind == hello {
		select {
		case <-c.hello:
		default:
			close(c.hello)
		}
	}
	c.mu.Unlock()
	if one == nil {
		return
	}
	switch f.kind {
	case out:
		_, _ = one.out.Write(f.data)
	case errs:
		_, _ = one.errs.Write(f.data)
	case exit:
		var r Result
		if err := json.Unmarshal(f.data, &r); err != nil {
			r = Result{Code: -1, Error: err.Error()}
		}
		c.mu.Lock()
		delete(c.calls, f.id)
		c.mu.Unlock()
		one.done <- r
	}
}

func (c *Client) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = fmt.Errorf("%w: %w", ErrLost, err)
	close(c.gone)
	for id, one := range c.calls {
		close(one.done)
		delete(c.calls, id)
	}
}

// Run runs a command in the guest until it ends. in, out and errs may be nil. A
// command that fails is an *ExitError; when ctx ends it is killed.
func (c *Client) Run(ctx context.Context, command Command, in io.Reader, out, errs io.Writer) error {
	var last tail
	one := &call{out: io.MultiWriter(orDiscard(out), &last), errs: io.MultiWriter(orDiscard(errs), &last), done: make(chan Result, 1)}
	id, err := c.begin(one)
	if err != nil {
		return err
	}
	text, err := json.Marshal(command)
	if err != nil {
		return err
	}
	if err := c.write(frame{id, start, text}); err != nil {
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	go c.feed(id, in)
	select {
	case r, ok := <-one.done:
		return c.outcome(command, r, ok, &last)
	case <-ctx.Done():
	}
	_ = c.write(frame{id: id, kind: kill})
	return errors.Join(context.Cause(ctx), fmt.Errorf("in the guest: %s: cut short: %s", strings.Join(command.Args, " "), last.String()))
}

func (c *Client) begin(one *call) (uint32, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	c.next++
	c.calls[c.next] = one
	return c.next, nil
}

func (c *Client) outcome(command Command, r Result, ok bool, last *tail) error {
	switch {
	case !ok:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.err
	case r.Code != 0:
		return &ExitError{command.Args, r, last.String()}
	}
	return nil
}

// feed sends a command's input and its end.
func (c *Client) feed(id uint32, in io.Reader) {
	buf := make([]byte, mostPayload)
	for in != nil {
		n, err := in.Read(buf)
		if n > 0 && c.write(frame{id, stdin, buf[:n]}) != nil {
			return
		}
		if err != nil {
			break
		}
	}
	_ = c.write(frame{id: id, kind: stdin})
}

// Close ends the connection; commands that run go on.
func (c *Client) Close() error { return c.conn.Close() }

func orDiscard(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

// tail keeps the end of what is written.
type tail struct {
	mu sync.Mutex
	b  bytes.Buffer
}

const keepTail = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b.Write(p)
	if over := t.b.Len() - keepTail; over > 0 {
		t.b.Next(over)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

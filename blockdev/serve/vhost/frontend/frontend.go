package frontend

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"holdfast/internal/sys"
)

// Options of a front end.
type Options struct {
	Queues   int    // 0: 1
	Depth    int    // requests in flight of each queue, at most 256; 0: 1
	Buffer   int    // bytes of data that a request may have, a multiple of 4096; 0: 4096
	Without  uint64 // virtio features not to use though they are offered
	Inflight bool   // keep what is in flight for the next server
}

// Feature bits that Without can name.
const (
	EventIdx = 1 << 29

	protocolBit = 1 << 30
	version1    = 1 << 32
	wanted      = version1 | EventIdx | protocolBit | 1<<5 | 1<<6 | 1<<9 | 1<<12 | 1<<13 | 1<<14 // read-only, block size, flush, queues, discard, zeroes

	protocolQueues   = 1 << 0
	protocolReplyAck = 1 << 3
	protocolConfig   = 1 << 9
	protocolInflight = 1 << 12
)

// guestBase is where the guest thinks that its memory begins, userBase the VMM.
const (
	guestBase = 1 << 32
	userBase  = 1 << 40
)

// Frontend is connected to one server at a time.
type Frontend struct {
	Queues []*Queue

	o        Options
	conn     *net.UnixConn
	file     *os.File // the guest's memory
	memory   []byte
	inflight *os.File
	region   []byte // description of inflight
	protocol uint64
}

// New makes the memory and the queues.
func New(o Options) (*Frontend, error) {
	o.Queues, o.Depth, o.Buffer = max(1, o.Queues), max(1, o.Depth), max(4096, o.Buffer)
	f := &Frontend{o: o}
	per := queueBytes(o)
	var err error
	if f.file, err = sys.MemoryFile("guest", int64(per*o.Queues)); err != nil {
		return nil, err
	}
	if f.memory, err = sys.MapShared(int(f.file.Fd()), int64(per*o.Queues)); err != nil {
		return nil, errors.Join(err, f.file.Close())
	}
	for n := range o.Queues {
		q, err := newQueue(f.memory[n*per:(n+1)*per], uint64(n*per), o)
		if err != nil {
			return nil, err
		}
		f.Queues = append(f.Queues, q)
	}
	return f, nil
}

// Memory is the guest's memory, for who wants to do what no guest should.
func (f *Frontend) Memory() []byte { return f.memory }

// MemoryFile gives the file of the guest's memory, another opening of it.
func (f *Frontend) MemoryFile() (*os.File, error) {
	fd, err := syscall.Dup(int(f.file.Fd()))
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	syscall.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "guest"), nil
}

// Close hangs up and gives the memory back.
func (f *Frontend) Close() error {
	f.Hangup()
	for _, q := range f.Queues {
		q.close()
	}
	if f.inflight != nil {
		_ = f.inflight.Close()
	}
	return errors.Join(sys.Unmap(f.memory), f.file.Close())
}

// Hangup drops the connection.
func (f *Frontend) Hangup() {
	if f.conn != nil {
		_ = f.conn.Close()
		f.conn = nil
	}
}

// Connect greets a server and starts all queues. After the first time the queues go
// on where they were.
func (f *Frontend) Connect(path string) error {
	f.Hangup()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	f.conn = conn
	if err := f.greet(); err != nil {
		return err
	}
	le := binary.LittleEndian
	table := le.AppendUint64(le.AppendUint64(le.AppendUint64(le.AppendUint64(le.AppendUint64(nil, 1), guestBase), uint64(len(f.memory))), userBase), 0)
	if err := f.Send(5, table, int(f.file.Fd())); err != nil {
		return err
	}
	for n, q := range f.Queues {
		if err := f.startQueue(uint32(n), q); err != nil {
			return fmt.Errorf("queue %d: %w", n, err)
		}
	}
	return nil
}

func (f *Frontend) greet() error {
	offered, err := f.AskU64(1)
	if err != nil {
		return err
	}
	features := offered & wanted &^ f.o.Without
	offered, err = f.AskU64(15)
	if err != nil {
		return err
	}
	f.protocol = offered & (protocolQueues | protocolReplyAck | protocolConfig)
	if f.o.Inflight {
		f.protocol |= offered & protocolInflight
	}
	for _, q := range f.Queues {
		q.eventIdx = features&EventIdx != 0
	}
	err = errors.Join(f.sendU64(16, f.protocol), f.Send(3, nil), f.sendU64(2, features))
	if err != nil || f.protocol&protocolInflight == 0 {
		return err
	}
	return f.shareInflight()
}

func (f *Frontend) shareInflight() error {
	if f.inflight == nil {
		want := binary.LittleEndian.AppendUint16(make([]byte, 16), uint16(len(f.Queues)))
		want = append(binary.LittleEndian.AppendUint16(want, f.Queues[0].num), 0, 0, 0, 0)
		region, fd, err := f.Ask(31, want)
		if err != nil {
			return err
		}
		if fd < 0 {
			return errors.New("no inflight region came")
		}
		f.region, f.inflight = region, os.NewFile(uintptr(fd), "inflight")
	}
	return f.Send(32, f.region, int(f.inflight.Fd()))
}

func (f *Frontend) startQueue(n uint32, q *Queue) error {
	le := binary.LittleEndian
	state := func(v uint32) []byte { return le.AppendUint32(le.AppendUint32(nil, n), v) }
	address := state(0)
	for _, at := range []uint64{q.descAt, q.usedAt, q.availAt, 0} {
		if at != 0 || len(address) == 8 {
			at += userBase
		}
		address = le.AppendUint64(address, at)
	}
	return errors.Join(
		f.Send(8, state(uint32(q.num))), f.Send(10, state(uint32(q.usedSeen()))), f.Send(9, address),
		f.Send(14, le.AppendUint64(nil, uint64(n)), q.fault),
		f.Send(13, le.AppendUint64(nil, uint64(n)), q.call), f.Send(12, le.AppendUint64(nil, uint64(n)), q.kick),
		f.Send(18, state(1)))
}

// StopQueue gives a queue back and tells its position.
func (f *Frontend) StopQueue(n int) (uint32, error) {
	b, _, err := f.Ask(11, binary.LittleEndian.AppendUint64(nil, uint64(n)))
	if err != nil || len(b) != 8 {
		return 0, errors.Join(err, fmt.Errorf("answer of %d bytes", len(b)))
	}
	return binary.LittleEndian.Uint32(b[4:]), nil
}

// Config reads the configuration space.
func (f *Frontend) Config() ([]byte, error) {
	b, _, err := f.Ask(24, append(binary.LittleEndian.AppendUint32(make([]byte, 4), 60), make([]byte, 64)...))
	if err == nil && len(b) != 72 {
		err = fmt.Errorf("answer of %d bytes", len(b))
	}
	if err != nil {
		return nil, err
	}
	return b[12:], nil
}

func (f *Frontend) sendU64(request uint32, v uint64) error {
	return f.Send(request, binary.LittleEndian.AppendUint64(nil, v))
}

// Send sends a request and, once that was agreed, waits for its acknowledgement.
func (f *Frontend) Send(request uint32, payload []byte, fds ...int) error {
	const setProtocol = 16
	flags := uint32(1)
	ack := f.protocol&protocolReplyAck != 0 && request > setProtocol || f.protocol&protocolReplyAck != 0 && request != setProtocol
	if ack {
		flags |= 1 << 3
	}
	if err := f.write(request, flags, payload, fds...); err != nil || !ack {
		return err
	}
	b, _, err := f.read(request)
	if err == nil && (len(b) != 8 || binary.LittleEndian.Uint64(b) != 0) {
		err = fmt.Errorf("request %d was refused: %x", request, b)
	}
	return err
}

// Ask sends a request that has an answer of its own.
func (f *Frontend) Ask(request uint32, payload []byte) (answer []byte, fd int, err error) {
	if err := f.write(request, 1, payload); err != nil {
		return nil, -1, err
	}
	return f.read(request)
}

// AskU64 is Ask for one number.
func (f *Frontend) AskU64(request uint32) (uint64, error) {
	b, _, err := f.Ask(request, nil)
	if err == nil && len(b) != 8 {
		err = fmt.Errorf("request %d was answered by %d bytes", request, len(b))
	}
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b), nil
}

func (f *Frontend) write(request, flags uint32, payload []byte, fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	b := make([]byte, 12, 12+len(payload))
	binary.LittleEndian.PutUint32(b, request)
	binary.LittleEndian.PutUint32(b[4:], flags)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(payload)))
	_, _, err := f.conn.WriteMsgUnix(append(b, payload...), rights, nil)
	return err
}

func (f *Frontend) read(request uint32) (payload []byte, fd int, err error) {
	header, control := make([]byte, 12), make([]byte, syscall.CmsgSpace(4))
	n, controlled, _, _, err := f.conn.ReadMsgUnix(header, control)
	if err != nil {
		return nil, -1, err
	}
	if _, err := io.ReadFull(f.conn, header[n:]); err != nil {
		return nil, -1, err
	}
	fd = -1
	if messages, err := syscall.ParseSocketControlMessage(control[:controlled]); err == nil && len(messages) == 1 {
		if fds, err := syscall.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
			fd = fds[0]
		}
	}
	size := binary.LittleEndian.Uint32(header[8:])
	if got := binary.LittleEndian.Uint32(header); got != request || size > 4096 {
		return nil, fd, fmt.Errorf("request %d was answered by %d with %d bytes", request, got, size)
	}
	payload = make([]byte, size)
	_, err = io.ReadFull(f.conn, payload)
	return payload, fd, err
}

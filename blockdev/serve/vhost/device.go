package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// Feature bits (virtio 1.2, 5.2.3 and 6; vhost-user.rst).
const (
	featureSegMax      = 1 << 2
	featureReadOnly    = 1 << 5
	featureBlockSize   = 1 << 6
	featureFlush       = 1 << 9
	featureTopology    = 1 << 10
	featureMultiQueue  = 1 << 12
	featureDiscard     = 1 << 13
	featureWriteZeroes = 1 << 14
	featureIndirect    = 1 << 28
	featureEventIdx    = 1 << 29
	featureProtocol    = 1 << 30
	featureVersion1    = 1 << 32

	protocolMultiQueue = 1 << 0
	protocolReplyAck   = 1 << 3
	protocolBackendReq = 1 << 5
	protocolConfig     = 1 << 9
	protocolInflight   = 1 << 12
	protocolReset      = 1 << 13
	protocolMemSlots   = 1 << 15
	protocolFeatures   = protocolMultiQueue | protocolReplyAck | protocolBackendReq | protocolConfig | protocolInflight | protocolReset | protocolMemSlots
)

const (
	sector     = 512
	serialSize = 20  // of GET_ID's answer
	segmentMax = 126 // pieces of memory in a request: a queue of 128 less header and status
	// rangeSectors bounds one discard or write of zeroes: 1 GiB.
	rangeSectors = 1 << 21
	configSize   = 60
	maxQueues    = 64
)

// Options of a device.
type Options struct {
	Serial   string // what the guest finds the disk by, up to 20 bytes
	ReadOnly bool
	Queues   int // 0: 1
	// Ended is told how a VMM's connection ended: nil when it hung up.
	Ended func(error)
}

// Device is a volume's file as a disk. Its methods may be called from any goroutine.
type Device struct {
	file   *os.File
	fd     int // of file, kept open
	block  int // bytes; what direct I/O asks for, at least a sector
	align  int // of memory; 1 when the page cache is used
	o      Options
	size   atomic.Int64
	failed atomic.Bool // a flush failed: nothing is acknowledged any more

	mu      sync.Mutex
	session *session
	closed  bool
}

// New serves a file or block device, which stays the caller's and must stay open;
// it is best opened with O_DIRECT. Its size must be a multiple of the block size.
func New(f *os.File, o Options) (*Device, error) {
	d, err := newDevice(f, o)
	return d, blockdev.Op("vhost.New", "", err)
}

func newDevice(f *os.File, o Options) (*Device, error) {
	o.Queues = max(o.Queues, 1)
	if o.Queues > maxQueues || len(o.Serial) > serialSize {
		return nil, fmt.Errorf("%w: %d queues (at most %d), serial of %d bytes (at most %d)", blockdev.ErrInvalid, o.Queues, maxQueues, len(o.Serial), serialSize)
	}
	direct, err := sys.DirectAlignment(f)
	if err != nil {
		return nil, err
	}
	d := &Device{file: f, block: max(sector, direct), align: max(1, direct), o: o}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := raw.Control(func(fd uintptr) { d.fd = int(fd) }); err != nil {
		return nil, err
	}
	return d, d.measure()
}

func (d *Device) measure() error {
	size, err := sys.BlockDeviceSize(d.file) // also a file's
	if err != nil {
		return err
	}
	if size <= 0 || size%int64(d.block) != 0 {
		return fmt.Errorf("%w: %d bytes in blocks of %d", blockdev.ErrInvalid, size, d.block)
	}
	d.size.Store(size)
	return nil
}

// Resized looks how large the file is now and tells the guest. The guest sees a
// larger disk at once; requests beyond the end of a smaller one fail.
func (d *Device) Resized() error {
	if err := d.measure(); err != nil {
		return blockdev.Op("vhost.Resized", "", err)
	}
	d.mu.Lock()
	s := d.session
	d.mu.Unlock()
	if s == nil {
		return nil
	}
	return blockdev.Op("vhost.Resized", "", s.tellConfig())
}

// Serve serves the VMMs that connect, one after the other, until l is closed or the
// device is; then it is nil. A connection that breaks leaves no request half done.
func (d *Device) Serve(l *net.UnixListener) error {
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return blockdev.Op("vhost.Serve", "", err)
		}
		s := newSession(d, conn)
		if !d.enter(s) {
			_ = conn.Close() // nothing was said
			return nil
		}
		err = s.serve()
		d.leave()
		if d.o.Ended != nil {
			d.o.Ended(err)
		}
	}
}

func (d *Device) enter(s *session) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.session = s
	}
	return !d.closed
}

func (d *Device) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.session = nil
}

// Close ends Serve when what has begun is done; the caller closes the listener
// first, which wakes it. Requests that have not begun stay in the guest's queue for
// the next server.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.session == nil {
		return nil
	}
	return d.session.conn.CloseRead()
}

// Failed tells whether a flush has failed, after which nothing is acknowledged.
func (d *Device) Failed() bool { return d.failed.Load() }

func (d *Device) features() uint64 {
	f := uint64(featureSegMax | featureBlockSize | featureFlush | featureTopology | featureIndirect | featureEventIdx | featureProtocol | featureVersion1)
	if d.o.Queues > 1 {
		f |= featureMultiQueue
	}
	if d.o.ReadOnly {
		return f | featureReadOnly
	}
	return f | featureDiscard | featureWriteZeroes
}

// config is struct virtio_blk_config.
func (d *Device) config() []byte {
	le := binary.LittleEndian
	c := make([]byte, configSize)
	le.PutUint64(c, uint64(d.size.Load()/sector))
	le.PutUint32(c[12:], segmentMax)
	le.PutUint32(c[20:], uint32(d.block))
	page := max(1, 4096/d.block) // what filesystems like, in blocks
	c[24] = byte(bits.TrailingZeros(uint(page)))
	le.PutUint16(c[26:], uint16(page))
	le.PutUint32(c[28:], uint32(page))
	c[32] = 1 // a write cache, which flushes empty
	le.PutUint16(c[34:], uint16(d.o.Queues))
	le.PutUint32(c[36:], rangeSectors)
	le.PutUint32(c[40:], 1)
	le.PutUint32(c[44:], uint32(4096/sector))
	le.PutUint32(c[48:], rangeSectors)
	le.PutUint32(c[52:], 1)
	c[56] = 1 // zeroes may be written by a hole
	return c
}

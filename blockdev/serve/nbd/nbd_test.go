package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/meter"
)

const mib = 1 << 20

func TestOptions(t *testing.T) {
	a := export(t, "a", image(t, 3*mib, 0), ExportOptions{Description: "the first"})
	b := export(t, "b", image(t, 5*mib, 0), ExportOptions{ReadOnly: true})
	_, socket := serving(t, Options{}, a, b)
	c := dial(t, socket)
	var names []string
	for _, r := range c.option(optList, nil) {
		if r.kind == repServer {
			names = append(names, string(r.data[4:]))
		}
	}
	if !slices.Equal(names, []string{"athe first", "b"}) {
		t.Errorf("listed %q", names)
	}
	for _, o := range []struct {
		name string
		opt  uint32
		data []byte
		want uint32
	}{
		{"list with data", optList, []byte("x"), repErrInvalid},
		{"unknown option", 999, []byte("whatever"), repErrUnsup},
		{"extended headers", 11, nil, repErrUnsup},
		{"no TLS here", optStartTLS, nil, repErrPolicy},
		{"structured with data", optStructuredReply, []byte{1}, repErrInvalid},
		{"info of nothing", optInfo, goBytes("c"), repErrUnknown},
		{"go to nothing", optGo, goBytes("c"), repErrUnknown},
		{"several exports have no default", optGo, goBytes(""), repErrUnknown},
		{"go without lengths", optGo, []byte{0, 0, 0}, repErrInvalid},
		{"go with a long name", optGo, append(binary.BigEndian.AppendUint32(nil, 1<<31), 0, 0), repErrInvalid},
		{"go with wrong infos", optGo, append(stringBytes("a"), 0, 9, 0, 1), repErrInvalid},
		{"too long", optInfo, make([]byte, maxOption+1), repErrTooBig},
		{"context before structured", optSetMetaContext, metaBytes("a", contextAllocation), repErrInvalid},
		{"list contexts without queries", optListMetaContext, metaBytes("a"), repAck},
		{"list contexts of nothing", optListMetaContext, metaBytes("c"), repErrUnknown},
		{"structured", optStructuredReply, nil, repAck},
		{"contexts, cut", optSetMetaContext, metaBytes("a", contextAllocation)[:12], repErrInvalid},
		{"contexts, more than told", optSetMetaContext, append(metaBytes("a", contextAllocation), 1), repErrInvalid},
		{"contexts without end", optSetMetaContext, append(stringBytes("a"), 0xff, 0xff, 0xff, 0xff), repErrInvalid},
		{"foreign context", optSetMetaContext, metaBytes("a", "qemu:dirty-bitmap:x"), repAck},
		{"info", optInfo, append(stringBytes("a"), 0, 3, 0, 1, 0, 2, 0, 3), repAck},
	} {
		if got := c.last(o.opt, o.data); got != o.want {
			t.Errorf("%s: reply %#x, want %#x", o.name, got, o.want)
		}
	}
	c.enter("b")
	if c.size != 5*mib || c.flags&exportReadOnly == 0 || c.flags&exportMultiConn == 0 || c.flags&exportDF == 0 || c.flags&exportTrim != 0 {
		t.Errorf("b has size %d, flags %#x", c.size, c.flags)
	}
}

func TestExportName(t *testing.T) {
	_, socket := serving(t, Options{}, export(t, "only", image(t, mib, 0), ExportOptions{}))
	c := dial(t, socket)
	c.write(optionBytes(optExportName, nil)) // the empty name is the only export
	reply := c.read(10)
	if size := binary.BigEndian.Uint64(reply); size != mib {
		t.Errorf("size %d", size)
	}
	c.ok(cmdWrite, 0, 4096, 4096, pattern(4096, 1))
	c.reads(4096, pattern(4096, 1))
	other := dial(t, socket)
	other.write(optionBytes(optExportName, []byte("none")))
	other.ended()
	left := dial(t, socket)
	if got := left.last(optAbort, nil); got != repAck {
		t.Errorf("abort: %#x", got)
	}
	left.ended()
}

// TestModel makes random requests, simple and structured, buffered and direct, and
// compares all that is read with a copy in memory.
func TestModel(t *testing.T) {
	const size = 8 * mib
	for name, flags := range map[string]int{"buffered": 0, "direct": syscall.O_DIRECT} {
		for _, structured := range []bool{false, true} {
			t.Run(name+map[bool]string{true: " structured", false: " simple"}[structured], func(t *testing.T) {
				f := image(t, size, flags)
				_, socket := serving(t, Options{}, export(t, "", f, ExportOptions{}))
				c := dial(t, socket)
				if structured {
					c.structured("")
				} else {
					c.enter("")
				}
				modelled(t, c, size, 400)
				c.write(requestBytes(cmdDisconnect, 0, 0, 0, 0))
				c.ended()
			})
		}
	}
}

func modelled(t *testing.T, c *client, size int, steps int) {
	t.Helper()
	model := make([]byte, size)
	r := rand.New(rand.NewPCG(uint64(steps), 2))
	for n := range steps {
		at := r.IntN(size/4096) * 4096
		length := min(size-at, (1+r.IntN(1<<r.IntN(9)))*4096)
		flags := uint16(r.IntN(2)) // FUA
		switch r.IntN(5) {
		case 0:
			c.reads(uint64(at), model[at:at+length])
		case 1:
			data := pattern(length, uint64(n))
			c.ok(cmdWrite, flags, uint64(at), uint32(length), data)
			copy(model[at:], data)
		case 2:
			c.ok(cmdWriteZeroes, flags|uint16(r.IntN(2))*flagNoHole, uint64(at), uint32(length), nil)
			clear(model[at : at+length])
		case 3:
			// A file's discarded ranges read as zero, which the protocol leaves open.
			c.ok(cmdTrim, flags, uint64(at), uint32(length), nil)
			clear(model[at : at+length])
		case 4:
			c.ok(cmdFlush, 0, 0, 0, nil)
		}
	}
	c.reads(0, model)
}

// TestManyInFlight sends requests without waiting and takes the replies in any order.
func TestManyInFlight(t *testing.T) {
	const requests = 500
	_, socket := serving(t, Options{}, export(t, "", image(t, requests*4096, syscall.O_DIRECT), ExportOptions{}))
	c := dial(t, socket).enter("")
	for _, kind := range []command{cmdWrite, cmdRead} {
		var sender sync.WaitGroup
		sender.Go(func() {
			for n := range uint64(requests) {
				b := requestBytes(kind, 0, n, n*4096, 4096)
				if kind == cmdWrite {
					b = append(b, pattern(4096, n)...)
				}
				if _, err := c.Write(b); err != nil {
					t.Error(err)
					return
				}
			}
		})
		seen := map[uint64]bool{}
		for range requests {
			cookie, result, data := c.reply(kind, 4096)
			if result != codeOK || seen[cookie] || kind == cmdRead && !bytes.Equal(data, pattern(4096, cookie)) {
				t.Fatalf("command %d, request %d: error %d, seen %v, or data that is not its own", kind, cookie, result, seen[cookie])
			}
			seen[cookie] = true
		}
		sender.Wait()
	}
}

func TestBlockStatus(t *testing.T) {
	f := image(t, 64*mib, 0)
	for _, at := range []int64{0, 3 * mib, 3*mib + 64<<10, 20 * mib, 64*mib - 4096} {
		_, err := f.WriteAt(pattern(64<<10, 1)[:min(64<<10, 64*mib-at)], at)
		must(t, err)
	}
	must(t, f.Sync())
	_, socket := serving(t, Options{}, export(t, "", f, ExportOptions{}))
	c := dial(t, socket).structured("")
	var data []extent.Range
	at := int64(0)
	for at < 64*mib {
		reply := c.ok(cmdBlockStatus, 0, uint64(at), uint32(64*mib-at), nil)
		if binary.BigEndian.Uint32(reply) != contextAllocationID {
			t.Fatalf("context %d", binary.BigEndian.Uint32(reply))
		}
		for reply = reply[4:]; len(reply) > 0; reply = reply[8:] {
			length, state := int64(binary.BigEndian.Uint32(reply)), binary.BigEndian.Uint32(reply[4:])
			if state == 0 {
				data = append(data, extent.Range{Offset: at, Length: length})
			} else if state != stateHole|stateZero {
				t.Errorf("state %d", state)
			}
			at += length
		}
	}
	truth, err := extent.Map(context.Background(), f)
	must(t, err)
	if !slices.Equal(data, truth) {
		t.Errorf("block status %v, the file has %v", data, truth)
	}
	if one := c.ok(cmdBlockStatus, flagReqOne, 0, 64*mib, nil); len(one) != 4+8 || binary.BigEndian.Uint32(one[4:]) != 64<<10 {
		t.Errorf("REQ_ONE gives %x", one)
	}
}

// TestResizeByReconnect: who connects anew is told the size, and who learned of it
// otherwise may use it.
func TestResizeByReconnect(t *testing.T) {
	f := image(t, 4*mib, 0)
	e := export(t, "", f, ExportOptions{})
	_, socket := serving(t, Options{}, e)
	old := dial(t, socket).enter("")
	must(t, f.Truncate(8*mib))
	must(t, e.Resize(8*mib))
	if err := e.Resize(4 * mib); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("shrunk: %v", err)
	}
	old.ok(cmdWrite, 0, 4*mib, 4096, pattern(4096, 2))
	if got, _ := old.request(cmdRead, 0, 8*mib, 4096, nil); got != codeInvalid {
		t.Errorf("the old connection reads past the end: %d", got)
	}
	grown := dial(t, socket).enter("")
	if grown.size != 8*mib {
		t.Errorf("the new connection sees %d bytes", grown.size)
	}
	grown.ok(cmdWrite, 0, 8*mib-4096, 4096, pattern(4096, 3))
}

// broken is a device that fails as told.
type broken struct {
	*device.File
	syncs             atomic.Int64
	sync, read, write atomic.Pointer[error]
	short             atomic.Bool
}

func (b *broken) Sync() error {
	b.syncs.Add(1)
	if err := b.sync.Load(); err != nil {
		return *err
	}
	return b.File.Sync()
}

func (b *broken) ReadAt(p []byte, off int64) (int, error) {
	if b.short.Load() {
		return len(p) / 2, nil
	}
	if err := b.read.Load(); err != nil {
		return 0, *err
	}
	return b.File.ReadAt(p, off)
}

func (b *broken) WriteAt(p []byte, off int64) (int, error) {
	if b.short.Load() {
		return len(p) / 2, nil
	}
	if err := b.write.Load(); err != nil {
		return 0, *err
	}
	return b.File.WriteAt(p, off)
}

func (b *broken) Zero(int64, int64, bool) error { return errors.ErrUnsupported }

func breakable(t *testing.T, size int64) (*broken, *Export) {
	t.Helper()
	file, err := device.NewFile(image(t, size, 0))
	must(t, err)
	b := &broken{File: file}
	e, err := NewExport("", b, ExportOptions{Size: size, Meter: &meter.Meter{}})
	must(t, err)
	return b, e
}

func TestDeviceErrors(t *testing.T) {
	b, e := breakable(t, mib)
	_, socket := serving(t, Options{}, e)
	c := dial(t, socket).structured("")
	for err, want := range map[error]code{
		syscall.ENOSPC: codeNoSpace, syscall.EDQUOT: codeNoSpace, syscall.EIO: codeIO, syscall.EROFS: codePerm, syscall.EACCES: codePerm,
		syscall.ENOMEM: codeNoMemory, io.ErrUnexpectedEOF: codeIO, os.ErrClosed: codeIO, syscall.EINVAL: codeIO,
	} {
		b.read.Store(&err)
		b.write.Store(&err)
		if got, _ := c.request(cmdRead, 0, 0, 4096, nil); got != want {
			t.Errorf("read with %v: %d, want %d", err, got, want)
		}
		if got, _ := c.request(cmdWrite, 0, 0, 4096, make([]byte, 4096)); got != want {
			t.Errorf("write with %v: %d, want %d", err, got, want)
		}
	}
	b.read.Store(nil)
	b.write.Store(nil)
	b.short.Store(true)
	for _, kind := range []command{cmdRead, cmdWrite} {
		payload := make([]byte, 4096*int(kind))
		if got, _ := c.request(kind, 0, 0, 4096, payload); got != codeIO {
			t.Errorf("command %d done in part: %d, want %d", kind, got, codeIO)
		}
	}
	b.short.Store(false)
	if s := e.meter.Snapshot(); s.Kinds[meter.Read].Errors != 10 || s.Kinds[meter.Write].Errors != 10 || s.Kinds[meter.Write].Bytes != 0 {
		t.Errorf("counted %+v", s.Kinds[meter.Read].Errors)
	}
}

// TestZeroesWithoutSupport: they are written, unless that is what the client did not
// want.
func TestZeroesWithoutSupport(t *testing.T) {
	_, e := breakable(t, 2*mib)
	_, socket := serving(t, Options{}, e)
	c := dial(t, socket).enter("")
	c.ok(cmdWrite, 0, 0, mib, pattern(mib, 1))
	if got, _ := c.request(cmdWriteZeroes, flagFastZero, 0, mib, nil); got != codeNotSup {
		t.Errorf("fast zeroes: %d", got)
	}
	c.reads(0, pattern(mib, 1))
	c.ok(cmdWriteZeroes, 0, 4096, mib-8192, nil)
	want := pattern(mib, 1)
	clear(want[4096 : mib-4096])
	c.reads(0, want)
}

// TestFailedSyncSticks: once a sync failed, nothing that must be durable is answered
// with success on any connection, and reads go on.
func TestFailedSyncSticks(t *testing.T) {
	for _, first := range []struct {
		kind   command
		flags  uint16
		length uint32
	}{{cmdFlush, 0, 0}, {cmdWrite, flagFUA, 4096}, {cmdWriteZeroes, flagFUA, 4096}, {cmdTrim, flagFUA, 4096}} {
		b, e := breakable(t, mib)
		_, socket := serving(t, Options{}, e)
		c, other := dial(t, socket).enter(""), dial(t, socket).structured("")
		c.ok(cmdWrite, 0, 0, 4096, pattern(4096, 1))
		var eio error = syscall.EIO
		b.sync.Store(&eio)
		var payload []byte
		if first.kind == cmdWrite {
			payload = make([]byte, 4096)
		}
		if got, _ := c.request(first.kind, first.flags, 0, first.length, payload); got != codeIO {
			t.Errorf("command %d with a failed sync: %d", first.kind, got)
		}
		b.sync.Store(nil)
		for _, on := range []*client{c, other} {
			if got, _ := on.request(cmdFlush, 0, 0, 0, nil); got != codeIO {
				t.Errorf("a flush after a failed sync: %d", got)
			}
			if got, _ := on.request(cmdWrite, 0, 0, 4096, make([]byte, 4096)); got != codeIO {
				t.Errorf("a write after a failed sync: %d", got)
			}
			on.ok(cmdRead, 0, 0, 4096, nil)
		}
		if !errors.Is(e.Failed(), blockdev.ErrFailed) || !errors.Is(e.Failed(), syscall.EIO) {
			t.Errorf("failed: %v", e.Failed())
		}
	}
}

// TestFlushesShareASync: who waits while one runs is served by the next, and never
// by one that began before.
func TestFlushesShareASync(t *testing.T) {
	var f flusher
	f.turn.L = &f.mu
	var syncs, written, durable atomic.Int64
	f.sync = func() error {
		syncs.Add(1)
		durable.Store(written.Load())
		return nil
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 2000 {
				mine := written.Add(1)
				if err := f.flush(); err != nil {
					t.Error(err)
				}
				if got := durable.Load(); got < mine {
					t.Errorf("flushed, and %d of %d writes are durable", got, mine)
				}
			}
		})
	}
	wg.Wait()
	if f.done != uint64(syncs.Load()) {
		t.Errorf("%d syncs ran, %d counted", syncs.Load(), f.done)
	}
}

func TestReadOnly(t *testing.T) {
	f := image(t, mib, 0)
	ro, err := os.Open(f.Name())
	must(t, err)
	t.Cleanup(func() { ro.Close() })
	_, socket := serving(t, Options{}, export(t, "", ro, ExportOptions{ReadOnly: true}))
	c := dial(t, socket).enter("")
	for _, kind := range []command{cmdWrite, cmdTrim, cmdWriteZeroes} {
		var payload []byte
		if kind == cmdWrite {
			payload = make([]byte, 4096)
		}
		if got, _ := c.request(kind, 0, 0, 4096, payload); got != codePerm {
			t.Errorf("command %d on a read-only export: %d", kind, got)
		}
	}
	c.ok(cmdFlush, 0, 0, 0, nil)
	c.ok(cmdRead, 0, 0, 4096, nil)
}

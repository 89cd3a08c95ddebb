package nbd

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/throttle"
	"holdfast/blockdev/serve/uring"
	"holdfast/internal/sys"
)

// transmissions are the tests of the transmission phase. By themselves they have io_uring
// on a unix socket.
var transmissions = map[string]func(*testing.T){
	"Model": TestModel, "ManyInFlight": TestManyInFlight, "BlockStatus": TestBlockStatus, "ResizeByReconnect": TestResizeByReconnect, "ReadOnly": TestReadOnly,
	"BadRequests": TestBadRequests, "BrokenClients": TestBrokenClients, "DisconnectMidRequest": TestDisconnectMidRequest, "ClientThatStopsReading": TestClientThatStopsReading,
	"ClientGoneBehindReplies": TestClientGoneBehindReplies, "MemoryOfRequests": TestMemoryOfRequests, "ThousandConnects": TestThousandConnects, "NothingIsLeft": TestNothingIsLeft, "Throttled": TestThrottled, "ThrottledClientLeaves": TestThrottledClientLeaves, "ThrottledForHours": TestThrottledForHours, "ThrottledAndClosed": TestThrottledAndClosed, "ThrottledOtherwise": TestThrottledOtherwise,
	"Layers": TestLayers, "SwapUnderLoad": TestSwapUnderLoad,
	"FullDisk": TestFullDisk, "ShortFile": TestShortFile, "FailedSyncOfAFile": TestFailedSyncOfAFile,
}

// TestByGoroutines runs them without io_uring.
func TestByGoroutines(t *testing.T) {
	byGoroutines = true
	defer func() { byGoroutines = false }()
	for name, test := range transmissions {
		t.Run(name, test)
	}
}

// TestOverTLS runs them over TLS.
func TestOverTLS(t *testing.T) {
	securely(t)
	for name, test := range transmissions {
		t.Run(name, test)
	}
	t.Run("SlowReader", TestSlowReader) // goroutines take in as many requests as there are of them
}

// TestOverTLSByGoroutines runs them over TLS without io_uring.
func TestOverTLSByGoroutines(t *testing.T) {
	securely(t)
	byGoroutines = true
	defer func() { byGoroutines = false }()
	for name, test := range transmissions {
		t.Run(name, test)
	}
}

// securely has servers and clients of a test meet with certificates.
func securely(t *testing.T) {
	t.Helper()
	a := newAuthority(t)
	overTLS = &struct{ server, client *tls.Config }{a.serverConfig(), a.clientConfig()}
	t.Cleanup(func() { overTLS = nil })
}

// rings counts the rings of this process.
func rings(t *testing.T) (n int) {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, name := range names {
		if to, err := os.Readlink("/proc/self/fd/" + name.Name()); err == nil && strings.Contains(to, "io_uring") {
			n++
		}
	}
	return n
}

// TestSocketsAreServedByRings: those of each kind, over TLS and in the clear.
func TestSocketsAreServedByRings(t *testing.T) {
	t.Run("unix", func(t *testing.T) {
		_, socket := serving(t, Options{}, export(t, "", image(t, mib, 0), ExportOptions{}))
		twoRings(t, func() *client { return dial(t, socket) })
	})
	t.Run("TCP", func(t *testing.T) {
		addr := servingTCP(t, Options{PlainLoopback: true}, export(t, "", image(t, mib, 0), ExportOptions{}))
		twoRings(t, func() *client { return dialTCP(t, addr) })
	})
	for _, network := range []string{"unix", "TCP"} {
		t.Run("TLS over "+network, func(t *testing.T) {
			a := newAuthority(t)
			o, config := Options{TLS: a.serverConfig()}, a.clientConfig()
			e := export(t, "", image(t, mib, 0), ExportOptions{})
			connect := func() *client { return nil }
			if network == "unix" {
				_, socket := serving(t, o, e)
				connect = func() *client { return dial(t, socket) }
			} else {
				addr := servingTCP(t, o, e)
				connect = func() *client { return dialTCP(t, addr) }
			}
			twoRings(t, func() *client {
				c := connect()
				must(t, c.secure(config))
				return c
			})
		})
	}
}

func twoRings(t *testing.T, connect func() *client) {
	t.Helper()
	before := rings(t)
	one, two := connect().enter(""), connect().enter("")
	one.ok(cmdWrite, flagFUA, 0, 4096, pattern(4096, 1))
	two.reads(0, pattern(4096, 1))
	if got := rings(t) - before; got != 2 {
		t.Errorf("two connections have %d rings", got)
	}
}

// TestSlowReader: a client that asks for more than its socket holds and reads it in
// small pieces gets every byte, whatever part of a reply found no room.
func TestSlowReader(t *testing.T) {
	data := image(t, mib, 0)
	whole := pattern(mib, 5)
	if _, err := data.WriteAt(whole, 0); err != nil {
		t.Fatal(err)
	}
	m := &meter.Meter{}
	_, socket := serving(t, Options{}, export(t, "", data, ExportOptions{Meter: m}))
	c := dial(t, socket).enter("")
	const requests, size = 64, 12 << 10
	for n := range uint64(requests) { // one by one, so that each reply is sent alone
		c.write(requestBytes(cmdRead, 0, n, n*size, size))
		await(t, func() bool { return m.Snapshot().Kinds[meter.Read].Requests > n })
	}
	seen := map[uint64]bool{}
	for range requests {
		head := c.read(simpleSize)
		n := binary.BigEndian.Uint64(head[8:])
		var got []byte
		for len(got) < size {
			got = append(got, c.read(1<<10)...)
		}
		if seen[n] || n >= requests || !bytes.Equal(got, whole[n*size:][:size]) {
			t.Fatalf("reply to request %d: seen %t, or not what is there", n, seen[n])
		}
		seen[n] = true
	}
}

// TestThrottled: a limit holds for all connections together, what waits for it is
// told, and it ends when it is lifted.
func TestThrottled(t *testing.T) {
	m, l := &meter.Meter{}, &throttle.Limiter{}
	l.Set(blockdev.Limits{WriteIOPS: 200, ReadBytes: 1 << 20}, 10*time.Millisecond)
	_, socket := serving(t, Options{}, export(t, "", image(t, mib, 0), ExportOptions{Meter: m, Limiter: l}))
	began := time.Now()
	clients := []*client{dial(t, socket).enter(""), dial(t, socket).enter("")}
	for _, c := range clients {
		var all []byte // at once, or a slow client would have them wait less
		for n := range uint64(20) {
			all = slices.Concat(all, requestBytes(cmdWrite, 0, n, n*4096, 4096), pattern(4096, n), requestBytes(cmdRead, 0, 100+n, n*4096, 4096))
		}
		c.write(all)
	}
	for _, c := range clients {
		for range 40 {
			head := c.read(simpleSize)
			if result := head[4:8]; !slices.Equal(result, []byte{0, 0, 0, 0}) {
				t.Fatalf("a throttled request fails: %x", head)
			}
			if head[15] >= 100 {
				c.read(4096)
			}
		}
	}
	// 40 writes at 200 a second, 2 of them at once; 160 KiB of reads at 1 MiB a second.
	if took := time.Since(began); took < 180*time.Millisecond {
		t.Errorf("40 writes went through in %v", took)
	}
	s := m.Snapshot()
	if s.Waits[meter.Throttle].Time < 100*time.Millisecond || s.Waits[meter.Throttle].Now != 0 || s.Inside != 0 {
		t.Errorf("waited %+v, %d inside", s.Waits[meter.Throttle], s.Inside)
	}
	if s.Kinds[meter.Write].Requests != 40 || s.Kinds[meter.Read].Bytes != 40*4096 {
		t.Errorf("counted %d writes, %d bytes of reads", s.Kinds[meter.Write].Requests, s.Kinds[meter.Read].Bytes)
	}
}

// TestThrottledOtherwise: requests that wait are taken from the limits that hold by then:
// each change lets one go, however many there were, and without limits all go.
func TestThrottledOtherwise(t *testing.T) {
	m := &meter.Meter{}
	e := export(t, "", image(t, mib, 0), ExportOptions{Meter: m, Limiter: &throttle.Limiter{}})
	_, socket := serving(t, Options{}, e)
	c := dial(t, socket).enter("")
	waiting := func(left int64) {
		t.Helper()
		await(t, func() bool { return m.Snapshot().Waits[meter.Throttle].Now == left })
	}
	answered := func(count int) {
		t.Helper()
		for range count {
			if head := c.read(simpleSize); !slices.Equal(head[4:8], []byte{0, 0, 0, 0}) {
				t.Fatalf("a throttled request fails: %x", head)
			}
		}
	}
	const requests, changes = 20, 8
	for _, last := range []blockdev.Limits{{}, {WriteBytes: 4096 * 100}} {
		e.Throttle(blockdev.Limits{WriteBytes: 1}, 1) // the first goes into debt for more than an hour
		for n := range uint64(requests) {
			c.write(append(requestBytes(cmdWrite, 0, n, n*4096, 4096), pattern(4096, n)...))
		}
		answered(1)
		waiting(requests - 1)
		for n := range int64(changes) {
			e.Throttle(blockdev.Limits{WriteBytes: 2 + n}, 1)
			answered(1)
			waiting(requests - 2 - n)
		}
		e.Throttle(last, 1)
		answered(requests - 1 - changes)
		waiting(0)
	}
}

// TestThrottledClientLeaves: requests that wait for hours hold nothing up when their
// client is gone.
func TestThrottledClientLeaves(t *testing.T) {
	m, l := &meter.Meter{}, &throttle.Limiter{}
	l.Set(blockdev.Limits{WriteIOPS: 1}, time.Millisecond)
	s, socket := serving(t, Options{}, export(t, "", image(t, mib, 0), ExportOptions{Meter: m, Limiter: l}))
	c := dial(t, socket).enter("")
	for n := range uint64(30) {
		c.write(append(requestBytes(cmdWrite, 0, n, 0, 4096), make([]byte, 4096)...))
	}
	await(t, func() bool { return m.Snapshot().Waits[meter.Throttle].Now > 20 })
	c.Close()
	await(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.conns == 0 })
	if s := m.Snapshot(); s.Kinds[meter.Write].Errors < 20 || s.Inside != 0 {
		t.Errorf("%d requests were dropped, %d are inside", s.Kinds[meter.Write].Errors, s.Inside)
	}
}

// TestThrottledForHours: nor do those that would wait for hours, however their client ends.
func TestThrottledForHours(t *testing.T) {
	m := &meter.Meter{}
	e := export(t, "", image(t, mib, 0), ExportOptions{Meter: m, Limiter: &throttle.Limiter{}})
	s, socket := serving(t, Options{}, e)
	for _, end := range []func(*client){
		func(c *client) { c.Close() }, func(c *client) { c.write(make([]byte, requestSize)) },
		func(c *client) { // no record of TLS, after which nothing can be encrypted
			if secured, ok := c.Conn.(*tls.Conn); ok {
				_, _ = secured.NetConn().Write(make([]byte, 100))
			}
			_ = c.CloseWrite()
		},
	} {
		e.Throttle(blockdev.Limits{WriteBytes: 1}, 1) // the first goes into debt
		c := dial(t, socket).enter("")
		c.write(bytes.Repeat(append(requestBytes(cmdWrite, 0, 1, 0, 4096), make([]byte, 4096)...), 10))
		await(t, func() bool { return m.Snapshot().Waits[meter.Throttle].Now == 9 })
		end(c)
		await(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.conns == 0 })
	}
}

// TestThrottledAndClosed: a server that is closed does not wait for what a client
// that said good-bye has left throttled.
func TestThrottledAndClosed(t *testing.T) {
	m, l := &meter.Meter{}, &throttle.Limiter{}
	l.Set(blockdev.Limits{WriteIOPS: 1}, time.Millisecond)
	s, socket := serving(t, Options{}, export(t, "", image(t, mib, 0), ExportOptions{Meter: m, Limiter: l}))
	c := dial(t, socket).enter("")
	for n := range uint64(streamWorkers) { // goroutines take no more of them in
		c.write(append(requestBytes(cmdWrite, 0, n, 0, 512), make([]byte, 512)...))
	}
	c.write(requestBytes(cmdDisconnect, 0, 0, 0, 0))
	await(t, func() bool { return m.Snapshot().Waits[meter.Throttle].Now > 20 })
	must(t, s.Close())
	if inside := m.Snapshot().Inside; inside != 0 {
		t.Errorf("%d requests are inside", inside)
	}
}

// TestMemoryOfRequests: requests hold no more memory than a connection's bound, whatever
// their lengths: the worst are those that are a little longer than some buffers.
func TestMemoryOfRequests(t *testing.T) {
	const most = maxPayload + bufferFront
	heap := func() int64 {
		runtime.GC()
		runtime.GC() // pools keep what they have for one
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return int64(s.HeapAlloc)
	}
	for length, fit := range map[uint32]int64{256<<10 + 512: 31, mib + 512: 7, 4*mib + 512: 1} {
		t.Run(strconv.Itoa(int(length)), func(t *testing.T) {
			m := &meter.Meter{}
			e := export(t, "", image(t, 64*mib, 0), ExportOptions{Meter: m})
			_, socket := serving(t, Options{MaxInFlight: most}, e)
			c := dial(t, socket).enter("")
			e.Throttle(blockdev.Limits{ReadBytes: 1}, 1)
			c.ok(cmdRead, 0, 0, 4096, nil) // who comes later waits
			before := heap()
			c.write(bytes.Repeat(requestBytes(cmdRead, 0, 1, 0, length), loopSlots))
			await(t, func() bool { return m.Snapshot().Waits[meter.Throttle].Now >= fit })
			if held := heap() - before; held > most+2*mib {
				t.Errorf("requests of %d bytes hold %d MiB", length, held/mib)
			}
		})
	}
}

// TestSlowDiskIsWaitedFor: a loop with many operations that take long sleeps until the
// first of them ends.
func TestSlowDiskIsWaitedFor(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ring, err := sys.NewUring(4)
	must(t, err)
	defer func() { must(t, ring.Close()) }()
	l := &loop{ring: ring, inflight: batchFrom}
	l.timerAt[0] = 1
	uring.Timeout(ring.Next(), &l.timers[0], int64(20*time.Millisecond), tagTimer)
	rounds := 0
	for ; l.timerAt[0] != 0; rounds++ {
		must(t, l.wait())
		l.events()
	}
	if rounds > 10 { // signals end some
		t.Errorf("the loop woke %d times in 20 ms, for nothing", rounds)
	}
}

// TestReadsAndWritesAllocateNothing counts all allocations of the process while one
// client reads and writes.
func TestReadsAndWritesAllocateNothing(t *testing.T) {
	_, socket := serving(t, Options{}, export(t, "", image(t, mib, syscall.O_DIRECT), ExportOptions{}))
	c := dial(t, socket).structured("")
	read, write, reply := requestBytes(cmdRead, 0, 1, 8192, 4096), append(requestBytes(cmdWrite, 0, 2, 4096, 4096), pattern(4096, 1)...), make([]byte, dataChunkSize+4096)
	exchange := func(request, reply []byte) {
		if _, err := c.Write(request); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, reply); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(300, func() {
		exchange(read, reply)
		exchange(write, reply[:simpleSize])
	}); n != 0 {
		t.Errorf("a read and a write allocate %v times", n)
	}
}

// TestFullDisk writes until the filesystem is full: that is an error of its own, and
// nothing that was answered is lost.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	must(t, syscall.Mount("none", dir, "tmpfs", 0, "size=4m"))
	defer func() { must(t, syscall.Unmount(dir, syscall.MNT_DETACH)) }()
	f, err := os.Create(dir + "/image")
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(16*mib))
	_, socket := serving(t, Options{}, export(t, "", f, ExportOptions{}))
	c := dial(t, socket).structured("")
	var written uint64
	for ; written < 16*mib; written += 64 << 10 {
		result, _ := c.request(cmdWrite, 0, written, 64<<10, pattern(64<<10, written))
		if result == codeNoSpace {
			break
		}
		if result != codeOK {
			t.Fatalf("a write to a full filesystem: error %d", result)
		}
	}
	if written < 3*mib || written > 4*mib {
		t.Errorf("%d bytes fit into 4 MiB", written)
	}
	for at := uint64(0); at < written; at += 64 << 10 {
		c.reads(at, pattern(64<<10, at))
	}
	c.ok(cmdTrim, 0, 0, uint32(written), nil)
	c.ok(cmdWrite, flagFUA, 8*mib, 64<<10, pattern(64<<10, 1))
}

// TestShortFile: a file that lost its end gives an error, not zeroes.
func TestShortFile(t *testing.T) {
	f := image(t, mib, 0)
	_, socket := serving(t, Options{}, export(t, "", f, ExportOptions{}))
	c := dial(t, socket).enter("")
	must(t, f.Truncate(64<<10+512))
	for _, r := range []struct {
		offset uint64
		length uint32
	}{{64 << 10, 4096}, {128 << 10, 4096}, {0, 128 << 10}} {
		if got, _ := c.request(cmdRead, 0, r.offset, r.length, nil); got != codeIO {
			t.Errorf("a read of %d at %d of a cut file: error %d", r.length, r.offset, got)
		}
	}
	c.ok(cmdRead, 0, 0, 64<<10, nil)
}

// unsynced is a file whose sync fails.
type unsynced struct{ *device.File }

func (u unsynced) Sync() error { return fmt.Errorf("sync: %w", syscall.EIO) }

func TestFailedSyncOfAFile(t *testing.T) {
	file, err := device.NewFile(image(t, mib, 0))
	must(t, err)
	e, err := NewExport("", unsynced{file}, ExportOptions{Size: mib})
	must(t, err)
	_, socket := serving(t, Options{}, e)
	c, other := dial(t, socket).structured(""), dial(t, socket).enter("")
	c.ok(cmdWrite, 0, 0, 4096, pattern(4096, 1))
	if got, _ := other.request(cmdWrite, flagFUA, 4096, 4096, pattern(4096, 1)); got != codeIO {
		t.Errorf("FUA with a failed sync: %d", got)
	}
	for _, on := range []*client{c, other} {
		if got, _ := on.request(cmdWrite, 0, 0, 4096, make([]byte, 4096)); got != codeIO {
			t.Errorf("a write after a failed sync: %d", got)
		}
		if got, _ := on.request(cmdFlush, 0, 0, 0, nil); got != codeIO {
			t.Errorf("a flush after a failed sync: %d", got)
		}
		on.reads(0, pattern(4096, 1))
	}
}

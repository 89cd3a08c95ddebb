package vhost_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/vhost"
	"holdfast/blockdev/serve/vhost/frontend"
)

const (
	imageSize = 4 << 20
	serial    = "vol-06c8qk4g1h6s9tj2"
	// servedImage and servedSocket make this test program a server, to be killed.
	servedImage  = "VHOST_TEST_IMAGE"
	servedSocket = "VHOST_TEST_SOCKET"
)

func TestMain(m *testing.M) {
	if image := os.Getenv(servedImage); image != "" {
		serveForEver(image, os.Getenv(servedSocket))
	}
	os.Exit(m.Run())
}

func serveForEver(image, socket string) {
	f, err := os.OpenFile(image, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		panic(err)
	}
	device, err := device.NewFile(f)
	if err != nil {
		panic(err)
	}
	d, err := vhost.New(device, vhost.Options{Serial: serial, Queues: 2})
	if err != nil {
		panic(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		panic(err)
	}
	panic(d.Serve(l))
}

func newImage(t testing.TB) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, make([]byte, imageSize), 0o600); err != nil {
		t.Fatal(err)
	}
	return image
}

// openFile makes a device of an image until the test ends.
func openFile(t testing.TB, image string, flags int) *device.File {
	t.Helper()
	f, err := os.OpenFile(image, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	d, err := device.NewFile(f)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// served serves an image until the test ends.
func served(t testing.TB, image string, flags int, o vhost.Options) (*vhost.Server, string) {
	t.Helper()
	return serving(t, openFile(t, image, flags), o)
}

// serving serves a device until the test ends.
func serving(t testing.TB, device vhost.Device, o vhost.Options) (*vhost.Server, string) {
	t.Helper()
	d, err := vhost.New(device, o)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- d.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(l.Close(), d.Close(), <-done); err != nil {
			t.Error(err)
		}
	})
	return d, socket
}

func connected(t testing.TB, socket string, o frontend.Options) *frontend.Frontend {
	t.Helper()
	f, err := frontend.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := f.Connect(socket); err != nil {
		t.Fatal(err)
	}
	return f
}

// one does one request alone.
func one(t testing.TB, q *frontend.Queue, put func()) byte {
	t.Helper()
	put()
	if err := errors.Join(q.Show(), q.Wait()); err != nil {
		t.Fatal(err)
	}
	_, status, _ := q.Take()
	return status
}

// model is what the image must hold; each slot works on blocks of its own, so that
// no two requests in flight touch the same.
type model struct {
	t     testing.TB
	bytes []byte
	rng   *rand.Rand
	kinds []uint32 // of each slot; what it does now
	at    []int
	size  []int
}

const block = 4096

func newModel(t testing.TB, depth int) *model {
	return &model{t: t, bytes: make([]byte, imageSize), rng: rand.New(rand.NewPCG(1, 2)), kinds: make([]uint32, depth), at: make([]int, depth), size: make([]int, depth)}
}

func (m *model) put(q *frontend.Queue, slot int) {
	span := imageSize / len(m.kinds)
	kinds := []uint32{frontend.Read, frontend.Read, frontend.Write, frontend.Write, frontend.Write, frontend.Flush, frontend.Discard, frontend.WriteZeroes}
	m.kinds[slot] = kinds[m.rng.IntN(len(kinds))]
	m.size[slot] = block * (1 + m.rng.IntN(4))
	m.at[slot] = slot*span + block*m.rng.IntN((span-m.size[slot])/block+1)
	sector := uint64(m.at[slot] / 512)
	switch m.kinds[slot] {
	case frontend.Discard, frontend.WriteZeroes:
		q.PutRange(slot, m.kinds[slot], sector, uint32(m.size[slot]/512), 0)
	case frontend.Flush:
		q.Put(slot, frontend.Flush, 0, 0)
	case frontend.Write:
		b := q.Data(slot)[:m.size[slot]]
		for n := 0; n < len(b); n += 8 {
			binary.LittleEndian.PutUint64(b[n:], m.rng.Uint64())
		}
		q.Put(slot, frontend.Write, sector, len(b))
	default:
		clear(q.Data(slot))
		q.Put(slot, frontend.Read, sector, m.size[slot])
	}
}

func (m *model) taken(q *frontend.Queue, slot int, status byte) {
	m.t.Helper()
	if status != 0 {
		m.t.Fatalf("request of kind %d at %d: status %d", m.kinds[slot], m.at[slot], status)
	}
	here := m.bytes[m.at[slot] : m.at[slot]+m.size[slot]]
	switch m.kinds[slot] {
	case frontend.Read:
		if !bytes.Equal(here, q.Data(slot)[:len(here)]) {
			m.t.Fatalf("%d bytes at %d read otherwise than written", len(here), m.at[slot])
		}
	case frontend.Write:
		copy(here, q.Data(slot))
	case frontend.Discard, frontend.WriteZeroes: // a discarded range of a file reads as zero
		clear(here)
	}
}

// load keeps a queue full for some requests. When interrupt says so it is called.
func (m *model) load(q *frontend.Queue, requests int, interrupt func(done int)) {
	m.t.Helper()
	begun, done := 0, 0
	for slot := range m.kinds {
		m.put(q, slot)
		begun++
	}
	for done < begun {
		if err := q.Show(); err != nil {
			m.t.Fatal(err)
		}
		if interrupt != nil {
			interrupt(done)
		}
		if err := q.Wait(); err != nil {
			m.t.Fatal(err)
		}
		for slot, status, ok := q.Take(); ok; slot, status, ok = q.Take() {
			m.taken(q, slot, status)
			if done++; begun < requests {
				m.put(q, slot)
				begun++
			}
		}
	}
	if done != max(requests, len(m.kinds)) {
		m.t.Errorf("%d answers to %d requests", done, begun)
	}
	if _, _, more := q.Take(); more {
		m.t.Error("a request was answered twice")
	}
}

func (m *model) check(image string) {
	m.t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		m.t.Fatal(err)
	}
	if !bytes.Equal(b, m.bytes) {
		m.t.Error("the image is not what was written")
	}
}

// checkDevice is check of what a device reads as.
func (m *model) checkDevice(d vhost.Device) {
	m.t.Helper()
	b := make([]byte, imageSize+block)
	b = b[-int(uintptr(unsafe.Pointer(&b[0])))&(block-1):][:imageSize]
	if _, err := d.ReadAt(b, 0); err != nil {
		m.t.Fatal(err)
	}
	if !bytes.Equal(b, m.bytes) {
		m.t.Error("the device does not read as what was written")
	}
}

func TestRandomRequestsAgainstAModel(t *testing.T) {
	for _, c := range []struct {
		name    string
		flags   int
		without uint64
		depth   int
	}{
		{"direct", os.O_RDWR | syscall.O_DIRECT, 0, 32},
		{"direct, one at a time", os.O_RDWR | syscall.O_DIRECT, 0, 1},
		{"page cache, no EVENT_IDX", os.O_RDWR, frontend.EventIdx, 16},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := newImage(t)
			_, socket := served(t, image, c.flags, vhost.Options{Serial: serial, Queues: 2})
			f := connected(t, socket, frontend.Options{Queues: 2, Depth: c.depth, Buffer: 4 * block, Without: c.without})
			m := newModel(t, c.depth)
			for _, q := range f.Queues {
				m.load(q, 1000, nil)
			}
			m.check(image)
		})
	}
}

// endWithParent lets no server outlive a test that is cut.
var endWithParent = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

// connectWhenThere connects to a server that is starting.
func connectWhenThere(t testing.TB, f *frontend.Frontend, socket string) {
	t.Helper()
	for {
		err := f.Connect(socket)
		if err == nil {
			return
		}
		if !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
}

// TestKilledServerLosesNothing: the server is killed under full load and another
// takes over; each request is answered once, and the image is what was written.
func TestKilledServerLosesNothing(t *testing.T) {
	image, dir := newImage(t), t.TempDir()
	socket := filepath.Join(dir, "s")
	var server *exec.Cmd
	start := func() {
		_ = os.Remove(socket)
		server = startServer(t, image, socket)
	}
	kill := func() {
		_ = server.Process.Kill()
		_ = server.Wait() // killed, as wanted
	}
	start()
	defer func() { kill() }()
	f, err := frontend.New(frontend.Options{Depth: 32, Buffer: 4 * block, Inflight: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	connectWhenThere(t, f, socket)
	m := newModel(t, 32)
	next, kills := 50, 0
	m.load(f.Queues[0], 3000, func(done int) {
		if done < next {
			return
		}
		next, kills = done+150, kills+1
		kill()
		start()
		connectWhenThere(t, f, socket)
	})
	m.check(image)
	if kills < 10 {
		t.Errorf("only %d kills", kills)
	}
}

func TestConfiguration(t *testing.T) {
	image := newImage(t)
	d, socket := served(t, image, os.O_RDWR, vhost.Options{Serial: serial, Queues: 3})
	f := connected(t, socket, frontend.Options{Queues: 3})
	capacity := func() uint64 {
		c, err := f.Config()
		if err != nil {
			t.Fatal(err)
		}
		return binary.LittleEndian.Uint64(c)
	}
	if got := capacity(); got != imageSize/512 {
		t.Errorf("%d sectors", got)
	}
	if n, err := f.AskU64(17); err != nil || n != 3 {
		t.Errorf("%d queues, %v", n, err)
	}
	q := f.Queues[0]
	if status := one(t, q, func() { q.Put(0, frontend.ID, 0, 20) }); status != 0 || string(q.Data(0)[:20]) != serial {
		t.Errorf("GET_ID: status %d, %q", status, q.Data(0)[:20])
	}
	if status := one(t, q, func() { q.Put(0, frontend.Read, imageSize/512, block) }); status != 1 {
		t.Errorf("beyond the end: status %d", status)
	}
	if err := errors.Join(os.Truncate(image, 2*imageSize), d.Resized()); err != nil {
		t.Fatal(err)
	}
	if got := capacity(); got != 2*imageSize/512 {
		t.Errorf("%d sectors after growing", got)
	}
	if status := one(t, q, func() { q.Put(0, frontend.Read, imageSize/512, block) }); status != 0 {
		t.Errorf("within the new size: status %d", status)
	}
	// A file that became shorter behind our back: nothing short is a success.
	if err := os.Truncate(image, imageSize+512); err != nil {
		t.Fatal(err)
	}
	if status := one(t, q, func() { q.Put(0, frontend.Read, imageSize/512, block) }); status != 1 {
		t.Errorf("half of it is there: status %d", status)
	}
	if status := one(t, q, func() { q.Put(0, 77, 0, 0) }); status != 2 {
		t.Errorf("unknown kind: status %d", status)
	}
	for _, bad := range []struct {
		kind   uint32
		sector uint64
		length int
	}{{frontend.Read, 1 << 62, block}, {frontend.Read, 0, 100}, {frontend.Write, 0, 0}, {frontend.Write, 1 << 40, block}} {
		if status := one(t, q, func() { q.Put(0, bad.kind, bad.sector, bad.length) }); status != 1 {
			t.Errorf("%+v: status %d", bad, status)
		}
	}
}

func TestReadOnly(t *testing.T) {
	image := newImage(t)
	_, socket := served(t, image, os.O_RDONLY, vhost.Options{ReadOnly: true})
	q := connected(t, socket, frontend.Options{}).Queues[0]
	for _, c := range []struct {
		put  func()
		want byte
	}{
		{func() { q.Put(0, frontend.Read, 0, block) }, 0},
		{func() { q.Put(0, frontend.Write, 0, block) }, 1},
		{func() { q.PutRange(0, frontend.Discard, 0, 8, 0) }, 1},
		{func() { q.PutRange(0, frontend.WriteZeroes, 0, 8, 0) }, 1},
	} {
		if status := one(t, q, c.put); status != c.want {
			t.Errorf("status %d, want %d", status, c.want)
		}
	}
}

// TestUnalignedMemory: firmware reads to anywhere, also where direct I/O cannot.
func TestUnalignedMemory(t *testing.T) {
	image := newImage(t)
	want := bytes.Repeat([]byte("0123456789abcdef"), block/16)
	if err := os.WriteFile(image, append(want, make([]byte, imageSize-block)...), 0o600); err != nil {
		t.Fatal(err)
	}
	_, socket := served(t, image, os.O_RDWR|syscall.O_DIRECT, vhost.Options{})
	f := connected(t, socket, frontend.Options{Buffer: 2 * block})
	q := f.Queues[0]
	put := func(kind uint32, sector uint64, way uint16) byte {
		return one(t, q, func() {
			q.Put(0, kind, sector, block)
			// The data in two pieces at odd addresses, by a longer chain.
			data := uint64(cap(f.Memory())) - 2*block + 1
			q.Descriptor(1, data, 1000, 1|way, 3)
			q.Descriptor(3, data+1000, block-1000, 1|way, 2)
		})
	}
	if status := put(frontend.Read, 0, 2); status != 0 || !bytes.Equal(q.Data(0)[1:1+block], want) {
		t.Errorf("read: status %d", status)
	}
	if status := put(frontend.Write, 8, 0); status != 0 {
		t.Errorf("write: status %d", status)
	}
	b, err := os.ReadFile(image)
	if err != nil || !bytes.Equal(b[block:2*block], want) {
		t.Errorf("not written: %v", err)
	}
}

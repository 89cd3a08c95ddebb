package vhost_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"holdfast/blockdev/serve/vhost"
	"holdfast/blockdev/serve/vhost/frontend"
	"holdfast/internal/sys"
)

// Requests of the protocol, flags of descriptors.
const (
	setMemTable = 5
	setEnable   = 18
	setBackend  = 21
	getConfig   = 24
	setConfig   = 25
	addMemory   = 37
	remMemory   = 38

	next, write, indirect = 1, 2, 4

	// Where the front end's memory begins for guest and VMM.
	guestBase = 1 << 32
	userBase  = 1 << 40
)

func words(values ...uint64) (b []byte) {
	for _, v := range values {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// offsetOf tells where something lies in the guest's memory.
func offsetOf(f *frontend.Frontend, b []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(f.Memory()))))
}

// moreMemory makes a piece of memory that a guest has besides.
func moreMemory(t *testing.T, size int64) (*os.File, []byte) {
	t.Helper()
	file, err := sys.MemoryFile("more", size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	b, err := sys.MapShared(int(file.Fd()), size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sys.Unmap(b); err != nil {
			t.Error(err)
		}
	})
	return file, b
}

// TestMemoryInPieces: a guest's memory comes in several regions, data lies in two of
// them, and regions come and go while the queue is in use.
func TestMemoryInPieces(t *testing.T) {
	image := newImage(t)
	want := bytes.Repeat([]byte("0123456789abcdef"), 2*block/16)
	if err := os.WriteFile(image, append(want, make([]byte, imageSize-2*block)...), 0o600); err != nil {
		t.Fatal(err)
	}
	_, socket := served(t, image, os.O_RDWR|syscall.O_DIRECT, vhost.Options{})
	f := connected(t, socket, frontend.Options{Buffer: 2 * block})
	q := f.Queues[0]
	read := func(what string, data []byte, at uint64) {
		t.Helper()
		clear(data)
		status := one(t, q, func() {
			q.Put(0, frontend.Read, 0, len(want))
			q.Descriptor(1, at, uint32(len(want)), next|write, 2)
		})
		if status != 0 || !bytes.Equal(data[:len(want)], want) {
			t.Errorf("%s: status %d", what, status)
		}
	}
	file, more := moreMemory(t, 4*block)
	mine, size := int(memoryFile(t, f).Fd()), uint64(len(f.Memory()))
	data := offsetOf(f, q.Data(0))
	cut := data + block
	// Two regions that meet in the middle of the data, though not for the VMM, and one
	// that is elsewhere for everybody.
	const far = 1 << 36
	table := bytes.Join([][]byte{words(3), words(guestBase, cut, userBase, 0), words(guestBase+cut, size-cut, userBase+2*size, cut), words(guestBase+far, 2*block, userBase+far, block)}, nil)
	if err := f.Send(setMemTable, table, mine, mine, int(file.Fd())); err != nil {
		t.Fatal(err)
	}
	read("over the cut", q.Data(0), data)
	read("in the third region", more[block:], far)
	third := append(words(0), words(guestBase+far, 2*block, userBase+far, block)...)
	if err := f.Send(remMemory, third, mine); err != nil {
		t.Fatal(err)
	}
	read("over the cut, without the third region", q.Data(0), data)
	if err := f.Send(addMemory, append(words(0), words(guestBase+2*far, 3*block, userBase+far, 0)...), int(file.Fd())); err != nil {
		t.Fatal(err)
	}
	read("in a region that was added", more, 2*far)
	q.Put(0, frontend.Read, 0, block)
	q.Descriptor(1, far, block, next|write, 2) // where the third region was
	if err := errors.Join(q.Show(), q.Kick()); err != nil {
		t.Fatal(err)
	}
	if !q.Seen() {
		t.Error("memory that is gone was used")
	}
	// What cannot be is refused by hanging up.
	f.Hangup()
	for name, region := range map[string][]byte{
		"overlaps":   words(guestBase+2*far+block, 3*block, userBase, 0),
		"of nothing": words(guestBase+far, 0, userBase, 0),
		"wraps":      words(^uint64(0)-block, 2*block, userBase, 0),
		"too far in": words(guestBase+far, 1<<45, userBase, 1<<46),
	} {
		again := connected(t, socket, frontend.Options{})
		if err := again.Send(addMemory, append(words(0), words(guestBase+2*far, 3*block, userBase+far, 0)...), int(file.Fd())); err != nil {
			t.Fatal(err)
		}
		if err := again.Send(addMemory, append(words(0), region...), int(file.Fd())); err == nil {
			t.Errorf("a region that %s was taken", name)
		}
		again.Hangup()
	}
}

// memoryFile finds the file of the front end's memory, as a VMM would have it.
func memoryFile(t *testing.T, f *frontend.Frontend) *os.File {
	t.Helper()
	file, err := f.MemoryFile()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

// TestIndirect: a request whose descriptors stand in a table of their own, with more
// pieces than a request keeps by itself.
func TestIndirect(t *testing.T) {
	image := newImage(t)
	_, socket := served(t, image, os.O_RDWR|syscall.O_DIRECT, vhost.Options{})
	const pieces = 40
	f := connected(t, socket, frontend.Options{Depth: 3, Buffer: pieces * block})
	q := f.Queues[0]
	table, tableAt := q.Data(1), offsetOf(f, q.Data(1))
	data, dataAt := q.Data(0), offsetOf(f, q.Data(0))
	head, headAt := q.Data(2), offsetOf(f, q.Data(2))
	entry := func(n int, at uint64, length uint32, flags, to uint16) {
		b := table[16*n : 16*n : 16*n+16]
		b = binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(b, guestBase+at), length)
		binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(b, flags), to)
	}
	request := func(kind uint32, way uint16) byte {
		binary.LittleEndian.PutUint32(head, kind)
		binary.LittleEndian.PutUint64(head[8:], 8)
		head[16] = 0xff
		entry(0, headAt, 16, next, 1)
		for n := range pieces { // from the last block of the data to the first
			entry(1+n, dataAt+uint64((pieces-1-n)*block), block, next|way, uint16(2+n))
		}
		entry(1+pieces, headAt+16, 1, write, 0)
		one(t, q, func() {
			q.Descriptor(0, tableAt, 16*(2+pieces), indirect, 0)
			q.PutHead(0)
		})
		return head[16]
	}
	for n := range data {
		data[n] = byte(n / block)
	}
	if status := request(frontend.Write, 0); status != 0 {
		t.Fatalf("write: status %d", status)
	}
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for n := range pieces {
		if got := b[(1+n)*block]; got != byte(pieces-1-n) {
			t.Errorf("block %d holds what was in piece %d", n, got)
		}
	}
	clear(data)
	if status := request(frontend.Read, write); status != 0 {
		t.Fatalf("read: status %d", status)
	}
	for n := range pieces {
		if got := data[n*block]; got != byte(n) {
			t.Errorf("piece %d was read from that of %d", n, got)
		}
	}
}

// TestDisabledQueue: nothing is taken from a queue that is disabled, and all that
// waits when it is enabled again.
func TestDisabledQueue(t *testing.T) {
	_, socket := served(t, newImage(t), os.O_RDWR, vhost.Options{Queues: 2})
	f := connected(t, socket, frontend.Options{Queues: 2})
	q, other := f.Queues[1], f.Queues[0]
	able := func(on uint32) {
		t.Helper()
		if err := f.Send(setEnable, binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, 1), on)); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		able(0)
		q.Put(0, frontend.Read, 0, block)
		if err := errors.Join(q.Show(), q.Kick()); err != nil {
			t.Fatal(err)
		}
		if status := one(t, other, func() { other.Put(0, frontend.Read, 0, block) }); status != 0 {
			t.Errorf("the other queue: status %d", status)
		}
		if _, _, ok := q.Take(); ok {
			t.Error("a disabled queue was served")
		}
		able(1)
		if err := q.Wait(); err != nil {
			t.Fatal(err)
		}
		if _, status, ok := q.Take(); !ok || status != 0 {
			t.Errorf("enabled again: %v, status %d", ok, status)
		}
	}
}

// TestConfigurationSpace is read in parts, not beyond its end, and not written; the
// VMM is told when it has changed.
func TestConfigurationSpace(t *testing.T) {
	image := newImage(t)
	d, socket := served(t, image, os.O_RDWR, vhost.Options{})
	f := connected(t, socket, frontend.Options{})
	all, err := f.Config()
	if err != nil {
		t.Fatal(err)
	}
	ask := func(offset, size uint32, room int) []byte {
		t.Helper()
		b := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, offset), size)
		answer, _, err := f.Ask(getConfig, append(b, make([]byte, 4+room)...))
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	if got := ask(20, 4, 4); len(got) != 16 || !bytes.Equal(got[12:], all[20:24]) {
		t.Errorf("the block size: %x", got)
	}
	if got := ask(250, 200, 200); len(got) != 212 || !bytes.Equal(got[12:], make([]byte, 200)) {
		t.Errorf("behind the end: %x", got)
	}
	for _, bad := range [][2]uint32{{257, 4}, {^uint32(0), 4}, {0, 257}, {0, ^uint32(0)}} {
		if got := ask(bad[0], bad[1], int(min(bad[1], 300))); len(got) != 0 {
			t.Errorf("%d bytes at %d: %x", bad[1], bad[0], got)
		}
	}
	if got := ask(0, 60, 59); len(got) != 0 {
		t.Errorf("without room for the answer: %x", got)
	}
	if err := f.Send(setConfig, append(words(8), make([]byte, 4+8)...)); err != nil {
		t.Error(err)
	}
	if now, err := f.Config(); err != nil || !bytes.Equal(now, all) {
		t.Errorf("it was written: %v", err)
	}

	if err := d.Resized(); err != nil { // nobody wants to know
		t.Error(err)
	}
	ours, theirs, err := sys.SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	err = errors.Join(f.Send(setBackend, nil, int(theirs.Fd())), theirs.Close(), os.Truncate(image, 2*imageSize), d.Resized())
	if err != nil {
		t.Fatal(err)
	}
	told := make([]byte, 64)
	if n, err := ours.Read(told); err != nil || !bytes.Equal(told[:n], []byte{2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("told %x, %v", told[:n], err)
	}
	if now, err := f.Config(); err != nil || binary.LittleEndian.Uint64(now) != 2*imageSize/512 {
		t.Errorf("grown: %x, %v", now, err)
	}
}

// TestMemoryCutByItsVMM: who takes a guest's memory away under the server ends that
// server, and no other.
func TestMemoryCutByItsVMM(t *testing.T) {
	dir := t.TempDir()
	cut, other := filepath.Join(dir, "cut"), filepath.Join(dir, "other")
	ending, staying := startServer(t, newImage(t), cut), startServer(t, newImage(t), other)
	defer func() {
		_ = staying.Process.Kill()
		_ = staying.Wait() // killed, as wanted
	}()
	connect := func(socket string) *frontend.Frontend {
		f, err := frontend.New(frontend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		connectWhenThere(t, f, socket)
		return f
	}
	f, q := connect(cut), connect(other).Queues[0]
	file, err := os.Create(filepath.Join(dir, "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const at = 1 << 36
	err = errors.Join(file.Truncate(block), f.Send(addMemory, append(words(0), words(guestBase+at, block, userBase+at, 0)...), int(file.Fd())), file.Truncate(0))
	if err != nil {
		t.Fatal(err)
	}
	f.Queues[0].Put(0, frontend.Read, 0, block)
	f.Queues[0].Descriptor(2, at, 1, write, 0) // the status goes where nothing is any more
	if err := f.Queues[0].Show(); err != nil {
		t.Fatal(err)
	}
	if err := ending.Wait(); err == nil {
		t.Error("the server ended as if all were well")
	}
	if status := one(t, q, func() { q.Put(0, frontend.Read, 0, block) }); status != 0 {
		t.Errorf("the other server: status %d", status)
	}
}

package overlay_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/nbd"
	"holdfast/blockdev/serve/overlay"
)

var _ nbd.Device = (*overlay.Overlay)(nil)

// TestServed: another maker's program sees a volume in layers as the disk that it
// is, its holes included, and what it writes is there.
func TestServed(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	const size = 64 << 20
	r := rand.New(rand.NewPCG(6, 6))
	base := someBase(r, 1000)
	want := newModel(base, size)
	stack := []overlay.Files{files(t, "one", 0)}
	must(t, overlay.Create(stack[0], size))
	v, err := overlay.Open(stack, base)
	must(t, err)
	write := func(off int64) {
		p := make([]byte, 70*block+3*sector)
		fill(r, p)
		_, err := v.WriteAt(p, off)
		must(t, err)
		want.wrote(p, off)
	}
	write(2 << 20)
	next := files(t, "two", 0)
	must(t, overlay.Create(next, size))
	must(t, v.Seal(next, func() error { return nil }))
	write(2<<20 + 3*sector)
	write(50 << 20)
	must(t, v.Discard(1<<20, 1<<19))
	want.wrote(make([]byte, 1<<19), 1<<20)

	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	must(t, err)
	export, err := nbd.NewExport("", v, nbd.ExportOptions{Size: size})
	must(t, err)
	server := nbd.NewServer(nbd.Options{})
	must(t, server.Add(export))
	served := make(chan error)
	go func() { served <- server.Serve(listener) }()
	uri := "nbd+unix:///?socket=" + socket
	program := func(args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	same := func(path string) {
		t.Helper()
		got, err := os.ReadFile(path)
		must(t, err)
		if !bytes.Equal(got, want.now) {
			t.Errorf("%s is another disk", filepath.Base(path))
		}
	}
	copied := filepath.Join(t.TempDir(), "copied")
	program("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copied)
	same(copied)
	f, err := os.Open(copied)
	must(t, err)
	defer f.Close()
	if held := allocated(t, overlay.OSFile{File: f}); held > 6<<20 {
		t.Errorf("the copy occupies %d bytes: holes were not told", held)
	}
	program("qemu-io", "-f", "raw", "-c", "write -P 0xaa 10M 100k", "-c", "write -z 2M 64k", "-c", "discard 40M 1M", "-c", "flush", uri)
	want.wrote(bytes.Repeat([]byte{0xaa}, 100<<10), 10<<20)
	want.wrote(make([]byte, 64<<10), 2<<20)
	must(t, server.Close())
	must(t, <-served)
	again, err := overlay.Open([]overlay.Files{next, stack[0]}, base)
	must(t, err)
	want.same(t, again)
}

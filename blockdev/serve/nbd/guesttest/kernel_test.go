package guesttest

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"holdfast/blockdev/nbddevice"
	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/nbd"
	"holdfast/internal/vmtest"
)

const mib = 1 << 20

func TestMain(m *testing.M) {
	os.Exit(vmtest.Main(m, vmtest.Options{Disks: []int64{2 << 30}}))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func command(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = "/tmp"
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// connect makes a device of an export, over several connections, until the end of the
// test or until the function that it gives is called.
func connect(t *testing.T, socket, name string, connections int) (path string, end func()) {
	t.Helper()
	command(t, "modprobe", "nbd")
	var terms nbddevice.Terms
	var sockets []*os.File
	for range connections {
		s, told, err := nbddevice.Dial(socket, name)
		must(t, err)
		defer s.Close()
		terms, sockets = told, append(sockets, s)
	}
	d, err := nbddevice.Attach(t.Name()+"/"+name, terms, sockets...)
	must(t, err)
	end = sync.OnceFunc(func() {
		if err := d.Detach(context.Background()); err != nil {
			t.Errorf("the kernel's client ends: %v", err)
		}
	})
	t.Cleanup(end)
	return d.Path, end
}

// served is an export of an image on the guest's disk.
func served(t *testing.T, size int64) (path, socket string, e *nbd.Export, m *meter.Meter) {
	t.Helper()
	dir := t.TempDir()
	command(t, "mkfs.xfs", "-q", "-f", vmtest.Disks()[0])
	must(t, syscall.Mount(vmtest.Disks()[0], dir, "xfs", 0, ""))
	t.Cleanup(func() { must(t, syscall.Unmount(dir, 0)) })
	path = filepath.Join(dir, "image")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	must(t, f.Truncate(size))
	d, err := device.NewFile(f)
	must(t, err)
	m = &meter.Meter{}
	e, err = nbd.NewExport("volume", d, nbd.ExportOptions{Size: size, Meter: m})
	must(t, err)
	s := nbd.NewServer(nbd.Options{})
	must(t, s.Add(e))
	socket = filepath.Join("/tmp", "nbd.sock")
	l, err := net.Listen("unix", socket)
	must(t, err)
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		must(t, s.Close())
		must(t, <-ended)
	})
	return path, socket, e, m
}

// TestKernelClient makes a filesystem over two connections, fills it, trims it,
// grows it by connecting again, and looks at the image afterwards without us.
func TestKernelClient(t *testing.T) {
	path, socket, e, m := served(t, 256*mib)
	device, end := connect(t, socket, "volume", 2)
	command(t, "mkfs.ext4", "-q", device)
	dir := t.TempDir()
	must(t, syscall.Mount(device, dir, "ext4", 0, ""))
	command(t, "sh", "-c", "dd if=/dev/urandom of="+dir+"/a bs=1M count=24 conv=fsync 2>&1; cp "+dir+"/a "+dir+"/b; sync; rm "+dir+"/b; sync")
	before := allocated(t, path)
	command(t, "fstrim", dir)
	if after := allocated(t, path); after > before-16*mib {
		t.Errorf("the trim freed %d bytes of the 24 MiB that were deleted", before-after)
	}
	sum := command(t, "sha256sum", dir+"/a")
	must(t, syscall.Unmount(dir, 0))
	end()

	must(t, os.Truncate(path, 320*mib))
	must(t, e.Resize(320*mib))
	device, end = connect(t, socket, "volume", 2)
	if got := command(t, "blockdev", "--getsize64", device); got != "335544320" {
		t.Errorf("grown, the kernel sees %s bytes", got)
	}
	command(t, "e2fsck", "-fp", device)
	command(t, "resize2fs", device)
	end()

	command(t, "e2fsck", "-fn", path)
	must(t, os.MkdirAll(dir, 0o700))
	loop := command(t, "losetup", "--find", "--show", path)
	defer command(t, "losetup", "-d", loop)
	must(t, syscall.Mount(loop, dir, "ext4", syscall.MS_RDONLY, ""))
	defer func() { must(t, syscall.Unmount(dir, 0)) }()
	if got := command(t, "sha256sum", dir+"/a"); got != sum {
		t.Errorf("the image holds another file: %s, was %s", got, sum)
	}
	s := m.Snapshot()
	for _, k := range []meter.Kind{meter.Read, meter.Write, meter.Flush, meter.Discard} {
		if s.Kinds[k].Requests == 0 || s.Kinds[k].Errors != 0 {
			t.Errorf("%s: %d requests, %d errors", k, s.Kinds[k].Requests, s.Kinds[k].Errors)
		}
	}
}

// TestKernelClientVerifies lets fio write and verify through the block device.
func TestKernelClientVerifies(t *testing.T) {
	_, socket, _, m := served(t, 64*mib)
	device, end := connect(t, socket, "volume", 4)
	command(t, "fio", "--name=x", "--filename="+device, "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bsrange=4k-128k", "--iodepth=16", "--size=64m", "--verify=crc32c", "--fsync=50")
	end()
	s := m.Snapshot()
	if s.Kinds[meter.Write].Errors+s.Kinds[meter.Read].Errors+s.Kinds[meter.Flush].Errors != 0 || s.Kinds[meter.Flush].Requests == 0 {
		t.Errorf("counted %d flushes, %d errors of writes", s.Kinds[meter.Flush].Requests, s.Kinds[meter.Write].Errors)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	must(t, syscall.Stat(path, &st))
	return st.Blocks * 512
}

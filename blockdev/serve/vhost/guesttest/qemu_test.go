package guesttest_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/vhost"
	"holdfast/internal/vmtest"
)

const (
	mib    = 1 << 20
	serial = "vol-06c8qk4g1h6s9tj2"
)

// server is a device, served until stop.
type server struct {
	device   *vhost.Server
	listener *net.UnixListener
	file     *os.File
	done     chan error
}

func serve(t *testing.T, image, socket string, queues int) *server {
	t.Helper()
	file, err := os.OpenFile(image, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	onFile, err := device.NewFile(file)
	if err != nil {
		t.Fatal(err)
	}
	d, err := vhost.New(onFile, vhost.Options{Serial: serial, Queues: queues, Ended: func(err error) {
		if err != nil {
			t.Errorf("QEMU's connection: %v", err)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	s := &server{device: d, listener: l, file: file, done: make(chan error, 1)}
	go func() { s.done <- d.Serve(l) }()
	return s
}

func (s *server) stop(t *testing.T) {
	t.Helper()
	err := errors.Join(s.listener.Close(), s.device.Close(), <-s.done, s.file.Close())
	if err != nil {
		t.Error(err)
	}
}

// plug gives QEMU the served disk. QEMU connects again when the server is gone.
func plug(t *testing.T, v *vmtest.VM, socket string, queues int) string {
	t.Helper()
	for _, step := range []struct {
		command string
		args    qmp.Args
	}{
		{"chardev-add", qmp.Args{"id": "served", "backend": qmp.Args{"type": "socket", "data": qmp.Args{
			"addr": qmp.Args{"type": "unix", "data": qmp.Args{"path": socket}}, "server": false, "reconnect": 1}}}},
		{"device_add", qmp.Args{"driver": "vhost-user-blk-pci", "id": "served", "chardev": "served", "num-queues": queues, "bus": "rp0"}},
	} {
		if err := v.Do(t.Context(), step.command, step.args); err != nil {
			t.Fatal(err)
		}
	}
	disk, err := v.Disk(t.Context(), serial)
	if err != nil {
		t.Fatal(err)
	}
	return disk
}

func unplug(t *testing.T, v *vmtest.VM, disk string) {
	t.Helper()
	if err := v.Do(t.Context(), "device_del", qmp.Args{"id": "served"}); err != nil {
		t.Fatal(err)
	}
	v.Sh(t, "while [ -e "+disk+" ]; do sleep 0.02; done")
}

// TestGuestUsesServedDisk: a filesystem is made, filled, trimmed and grown while the
// guest has it mounted; the server is replaced under its writes; nothing is lost.
func TestGuestUsesServedDisk(t *testing.T) {
	v := vmtest.Start(t, vmtest.Options{SharedMemory: true})
	image, socket := filepath.Join(t.TempDir(), "image"), filepath.Join(v.Dir, "served")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 64*mib)); err != nil {
		t.Fatal(err)
	}
	s := serve(t, image, socket, 2)
	disk := plug(t, v, socket, 2)
	v.Sh(t, "mkfs.ext4 -q "+disk+" && mkdir -p /mnt && mount "+disk+" /mnt")
	v.Sh(t, "dd if=/dev/urandom of=/mnt/data bs=64k count=128 2>/dev/null; sync; cp /mnt/data /mnt/gone; sync; echo 3 > /proc/sys/vm/drop_caches; cmp /mnt/data /mnt/gone")

	full := allocated(t, image)
	v.Sh(t, "rm /mnt/gone; sync; fstrim /mnt")
	if now := allocated(t, image); now > full-4*mib {
		t.Errorf("%d bytes are allocated after fstrim, %d were before", now, full)
	}

	if err := errors.Join(os.Truncate(image, 128*mib), s.device.Resized()); err != nil {
		t.Fatal(err)
	}
	v.Sh(t, fmt.Sprintf("while [ $(cat /sys/block/%s/size) != %d ]; do sleep 0.02; done; resize2fs %s 2>/dev/null", filepath.Base(disk), 128*mib/512, disk))

	// The writer never hears of the servers that come and go.
	v.Sh(t, "(i=0; while [ ! -e /tmp/enough ]; do dd if=/mnt/data of=/mnt/copy$((i % 4)) bs=16k conv=fsync 2>>/tmp/errors || { echo $? >> /tmp/failed; break; }; i=$((i+1)); echo $i > /tmp/rounds; done) >/dev/null 2>&1 & ")
	for range 3 {
		wrote := v.Sh(t, "cat /tmp/rounds 2>/dev/null || echo 0")
		s.stop(t)
		s = serve(t, image, socket, 2)
		v.Sh(t, "while [ \"$(cat /tmp/rounds 2>/dev/null)\" = '"+wrote+"' ] && [ ! -e /tmp/failed ]; do sleep 0.05; done")
	}
	v.Sh(t, "touch /tmp/enough; while pgrep -x dd >/dev/null; do sleep 0.02; done; [ ! -e /tmp/failed ] && sync && echo 3 > /proc/sys/vm/drop_caches && cmp /mnt/data /mnt/copy0")
	if log := v.Sh(t, "dmesg | grep -i 'i/o error' || true"); log != "" {
		t.Errorf("the guest saw %s", log)
	}
	v.Sh(t, "umount /mnt")
	unplug(t, v, disk)
	s.stop(t)
	if out, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

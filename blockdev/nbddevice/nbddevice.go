package nbddevice

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// BlockSize is a device's logical block, in bytes: what a server's sizes are whole
// multiples of.
const BlockSize = 4096

const (
	// deadTime is how long requests wait for a server that is away, before they fail and
	// a filesystem with them. While a daemon runs its servers are away for milliseconds; that
	// one is mended or a host's operator woken takes minutes. Not for ever: what waits
	// cannot be killed, and is to come to an end by itself where no server comes back.
	deadTime = time.Hour
	// resendTime is when the kernel looks whether a request that it waits for went to a
	// server that is gone: if so, and there is another one, it is sent again.
	resendTime = 5 * time.Second
	// kernelResendTime is what the kernel has unasked.
	kernelResendTime = 30 * time.Second
)

// Device is a device as it was found. By the time it is read it may have changed hands:
// every function that is given one verifies it.
type Device struct {
	Path     string // "/dev/nbdN"
	Backend  string
	Size     int64 // bytes
	ReadOnly bool
	number   int
}

// Available is nil where devices can be made. errors.ErrUnsupported, with the reason,
// where the kernel has no NBD client, or one that is too old.
func Available() error {
	err := sys.NBDAvailable()
	if errors.Is(err, sys.ErrNoNBD) {
		err = fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return blockdev.Op("nbddevice.Available", "", err)
}

// Attach makes a device of the export that terms are of, over connections to one server
// that Dial has made. Read-only is what the server says of itself. The device stays when
// this process ends.
func Attach(backend string, t Terms, sockets ...*os.File) (Device, error) {
	d, err := attach(backend, t, sockets)
	return d, blockdev.Op("nbddevice.Attach", "", err)
}

func attach(backend string, t Terms, sockets []*os.File) (Device, error) {
	if t.Size <= 0 || t.Size%BlockSize != 0 {
		return Device{}, fmt.Errorf("%w: a size of %d bytes, not whole blocks of %d", blockdev.ErrInvalid, t.Size, BlockSize)
	}
	number, err := sys.NBDConnect(sys.NBDConfig{Backend: backend, Sockets: sockets, Size: t.Size, Block: BlockSize, Flags: t.Flags, Dead: deadTime})
	if err != nil {
		return Device{}, err
	}
	d, err := inspect("nbd" + strconv.Itoa(number))
	if err == nil && d.Backend != backend {
		err = fmt.Errorf("%s is of %q", d.Path, d.Backend)
	}
	if err == nil {
		err = d.setResend(resendTime)
	}
	if err == nil {
		err = d.awaitNode()
	}
	if err != nil {
		return Device{}, errors.Join(err, sys.NBDDisconnect(number))
	}
	return d, nil
}

// nodeTime is how long a device's node may take to be made.
const nodeTime = 5 * time.Second

// awaitNode waits for the node of a device whose number is new.
func (d Device) awaitNode() error {
	for deadline := time.Now().Add(nodeTime); ; time.Sleep(time.Millisecond) {
		node, err := os.Open(d.Path)
		if err == nil {
			return node.Close()
		}
		if !errors.Is(err, os.ErrNotExist) || time.Now().After(deadline) {
			return err
		}
	}
}

// setResend sets how long a request may take until the kernel looks at it again.
func (d Device) setResend(t time.Duration) error {
	text := strconv.FormatInt(t.Milliseconds(), 10)
	return os.WriteFile("/sys/block/"+filepath.Base(d.Path)+"/queue/io_timeout", []byte(text), 0) // it is there
}

// Find tells the device of a backend; blockdev.ErrNotFound when there is none.
func Find(backend string) (Device, error) {
	all, err := filepath.Glob("/sys/block/nbd*/backend")
	if err != nil {
		return Device{}, blockdev.Op("nbddevice.Find", "", err)
	}
	for _, path := range all {
		d, err := inspect(filepath.Base(filepath.Dir(path)))
		switch {
		case err == nil && d.Backend == backend:
			return d, nil
		case err != nil && !errors.Is(err, blockdev.ErrNotFound): // disconnected meanwhile
			return Device{}, blockdev.Op("nbddevice.Find", "", err)
		}
	}
	return Device{}, blockdev.Op("nbddevice.Find", "", fmt.Errorf("a device of %q: %w", backend, blockdev.ErrNotFound))
}

// inspect reads sysfs: to open a device may wait for its server.
func inspect(name string) (Device, error) {
	read := func(file string) string { // "" for what is gone
		text, err := os.ReadFile("/sys/block/" + name + "/" + file)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(text))
	}
	number, err := strconv.Atoi(strings.TrimPrefix(name, "nbd"))
	if err != nil {
		return Device{}, err
	}
	const sector = 512 // unit of sizes in sysfs, whatever the device's own is
	sectors, err := strconv.ParseInt(read("size"), 10, 64)
	backend := read("backend")
	if err != nil || backend == "" {
		return Device{}, fmt.Errorf("%s: %w", name, blockdev.ErrNotFound)
	}
	return Device{Path: "/dev/" + name, Backend: backend, Size: sectors * sector, ReadOnly: read("ro") == "1", number: number}, nil
}

// verify makes sure that it is still this use of the device; blockdev.ErrNotFound.
func (d Device) verify() error {
	now, err := inspect(filepath.Base(d.Path))
	if err == nil && now.Backend != d.Backend {
		err = fmt.Errorf("%s belongs to somebody else now: %w", d.Path, blockdev.ErrNotFound)
	}
	return err
}

// Reconnect gives a device whose server has ended a connection to another one, that Dial
// has made; it closes the socket. taken is false while the kernel has not noticed that
// there is no server any more, or when there is one.
func (d Device) Reconnect(socket *os.File) (taken bool, err error) {
	taken, err = d.reconnect(socket)
	return taken, blockdev.Op("nbddevice.Reconnect", "", err)
}

func (d Device) reconnect(socket *os.File) (taken bool, err error) {
	status, err := sys.StatusOf(socket)
	if err == nil {
		err = sys.NBDReconnect(d.number, d.Backend, socket)
	}
	if err = errors.Join(err, socket.Close()); err != nil {
		return false, err
	}
	// The kernel answers all the same when it has no use for it.
	return sys.UnixSocketExists(status.Inode)
}

// Grow makes a device larger whose server is, and tells its size in bytes; consumers of
// the device see it on return. One that is as large is success.
func (d Device) Grow(size int64) (int64, error) {
	err := d.verify()
	if err == nil && d.Size < size {
		err = sys.NBDResize(d.number, d.Backend, size)
	}
	if err != nil {
		return 0, blockdev.Op("nbddevice.Grow", "", err)
	}
	now, err := inspect(filepath.Base(d.Path))
	return now.Size, blockdev.Op("nbddevice.Grow", "", err)
}

// Detach flushes a device and takes its connection away; its server is to run. nil when
// no way leads from the device to the server any more, or it is not this use of it.
// blockdev.ErrBusy while a filesystem on it is mounted in any namespace: nothing has
// changed then. blockdev.ErrFailed when the flush failed: it is disconnected all the
// same, as what was lost does not come back.
func (d Device) Detach(ctx context.Context) error {
	return blockdev.Op("nbddevice.Detach", "", d.detach(ctx))
}

func (d Device) detach(ctx context.Context) error {
	if err := errors.Join(ctx.Err(), d.verify()); err != nil {
		return gone(err)
	}
	// Held alone, nobody mounts it meanwhile; held at all, nobody else gets its number.
	node, err := os.OpenFile(d.Path, os.O_RDONLY|syscall.O_EXCL, 0)
	switch {
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%s: %w: a filesystem on it is mounted, or a process has it alone", d.Path, blockdev.ErrBusy)
	case err != nil:
		return err
	}
	defer node.Close()
	if err := d.verify(); err != nil {
		return gone(err)
	}
	flushed := node.Sync()
	if flushed != nil {
		flushed = fmt.Errorf("%s: %w: %w", d.Path, blockdev.ErrFailed, flushed)
	}
	return errors.Join(flushed, d.disconnect())
}

// Abandon takes the connection away whoever uses the device: what waits and all that comes
// fails. The device goes with its last user. Not this use of the device is success.
func (d Device) Abandon() error {
	return blockdev.Op("nbddevice.Abandon", "", gone(d.disconnect()))
}

// disconnect is only done to a device that is this use: that changes with a disconnect
// alone, and nobody does that to what is not his.
func (d Device) disconnect() error {
	err := d.verify()
	if err == nil {
		err = d.setResend(kernelResendTime) // as it was, for whoever has the number next
	}
	if err == nil {
		err = sys.NBDDisconnect(d.number)
	}
	return err
}

// gone makes success of a device that is not there any more.
func gone(err error) error {
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	return err
}

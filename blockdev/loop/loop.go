package loop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// attachTries bounds how often Attach takes another free device because
// somebody was faster.
const attachTries = 64

// Device is a loop device as it was found. By the time it is read it may have
// changed hands: every function that is given one verifies it.
type Device struct {
	Path     string     // "/dev/loopN"
	File     sys.FileID // the backing file
	Size     int64      // bytes
	ReadOnly bool
	DirectIO bool
	// Sequence is the kernel's number for this use of the device: another one
	// means that the device was detached in between. Unique for one boot.
	Sequence uint64

	Autoclear bool // will be detached at the last close
	Partial   bool // shows only a part of its file: not made by this package
}

// Attach makes a new device of the file f, with direct I/O where the file allows
// it. readOnly is enforced by the device: f may then be open for reading only.
// The device stays when this process ends.
func Attach(f *os.File, readOnly bool) (Device, error) {
	for range attachTries {
		device, err := attachOnce(f, readOnly)
		if !errors.Is(err, syscall.EBUSY) {
			return device, blockdev.Op("loop.Attach", "", err)
		}
	}
	return Device{}, blockdev.Op("loop.Attach", "", fmt.Errorf("no free loop device after %d tries: %w", attachTries, blockdev.ErrBusy))
}

func attachOnce(f *os.File, readOnly bool) (Device, error) {
	number, err := sys.LoopFree()
	if err != nil {
		return Device{}, err
	}
	node, err := os.OpenFile("/dev/loop"+strconv.Itoa(number), os.O_RDWR, 0)
	if err != nil {
		return Device{}, err
	}
	defer node.Close()
	if err := sys.LoopConfigure(node, f, readOnly); err != nil {
		return Device{}, err
	}
	device, err := inspect(node)
	if err != nil {
		return Device{}, errors.Join(err, sys.LoopClear(node))
	}
	return device, nil
}

// Find tells the devices that f is the backing file of.
func Find(f *os.File) ([]Device, error) {
	status, err := sys.StatusOf(f)
	if err != nil {
		return nil, blockdev.Op("loop.Find", "", err)
	}
	all, err := List()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(d Device) bool { return d.File != status.FileID }), nil
}

// List tells all devices of the host that have a backing file.
func List() ([]Device, error) {
	blocks, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, blockdev.Op("loop.List", "", err)
	}
	var devices []Device
	for _, block := range blocks {
		name := block.Name()
		if !strings.HasPrefix(name, "loop") {
			continue
		}
		if _, err := os.Lstat("/sys/block/" + name + "/loop"); err != nil {
			continue // no backing file
		}
		device, err := Inspect("/dev/" + name)
		switch {
		case err == nil:
			devices = append(devices, device)
		case !errors.Is(err, blockdev.ErrNotFound): // detached meanwhile
			return nil, err
		}
	}
	return devices, nil
}

// Inspect tells what the device at path is now; blockdev.ErrNotFound when it has
// no backing file.
func Inspect(path string) (Device, error) {
	node, err := os.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENXIO) {
		return Device{}, blockdev.Op("loop.Inspect", "", fmt.Errorf("%s: %w", path, blockdev.ErrNotFound))
	}
	if err != nil {
		return Device{}, blockdev.Op("loop.Inspect", "", err)
	}
	defer node.Close()
	device, err := inspect(node)
	return device, blockdev.Op("loop.Inspect", "", err)
}

func inspect(node *os.File) (Device, error) {
	status, err := sys.LoopStatusOf(node)
	if errors.Is(err, sys.ErrNoLoop) {
		return Device{}, fmt.Errorf("%s: %w (%w)", node.Name(), blockdev.ErrNotFound, err)
	}
	if err != nil {
		return Device{}, err
	}
	size, err := sys.BlockDeviceSize(node)
	if err != nil {
		return Device{}, err
	}
	sequence, err := sequenceOf(node.Name())
	if err != nil {
		return Device{}, err
	}
	return Device{
		Path: node.Name(), File: sys.FileID{Device: status.Device, Inode: status.Inode}, Size: size,
		ReadOnly: status.ReadOnly, DirectIO: status.DirectIO, Sequence: sequence,
		Autoclear: status.Autoclear, Partial: status.Offset != 0 || status.SizeLimit != 0,
	}, nil
}

func sequenceOf(path string) (uint64, error) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/diskseq")
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}

// openSame opens the device's node and makes sure that it is still this use of
// it; blockdev.ErrNotFound otherwise. While the node is open the kernel does not
// give the device to anybody else.
func (d Device) openSame(flag int) (*os.File, error) {
	node, err := os.OpenFile(d.Path, flag, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENXIO) {
		return nil, fmt.Errorf("%s: %w", d.Path, blockdev.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	now, err := inspect(node)
	if err == nil && (now.File != d.File || now.Sequence != d.Sequence) {
		err = fmt.Errorf("%s belongs to another file now: %w", d.Path, blockdev.ErrNotFound)
	}
	if err != nil {
		node.Close()
		return nil, err
	}
	return node, nil
}

// Grow makes the device as large as its file is now, and tells the size in
// bytes. Consumers of the device see it on return.
func (d Device) Grow() (int64, error) {
	node, err := d.openSame(os.O_RDONLY)
	if err != nil {
		return 0, blockdev.Op("loop.Grow", "", err)
	}
	defer node.Close()
	if err := sys.LoopSetCapacity(node); err != nil {
		return 0, blockdev.Op("loop.Grow", "", err)
	}
	size, err := sys.BlockDeviceSize(node)
	return size, blockdev.Op("loop.Grow", "", err)
}

// Keep takes the autoclear mark from a device, so that it stays until Detach.
func (d Device) Keep() error {
	node, err := d.openSame(os.O_RDONLY)
	if err != nil {
		return blockdev.Op("loop.Keep", "", err)
	}
	defer node.Close()
	return blockdev.Op("loop.Keep", "", sys.LoopKeep(node))
}

// Flush makes all that was written to the device durable. An error of the flush
// is blockdev.ErrFailed.
func (d Device) Flush() error {
	node, err := d.openSame(os.O_RDONLY)
	if err != nil {
		return blockdev.Op("loop.Flush", "", err)
	}
	defer node.Close()
	return blockdev.Op("loop.Flush", "", flush(node))
}

func flush(node *os.File) error {
	if err := node.Sync(); err != nil {
		return fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
	}
	return nil
}

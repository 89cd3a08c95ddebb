package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

const (
	// releaseTime is how long Detach waits for other openings of the device to be
	// closed: programs that scan devices (udev, blkid) open each for a moment.
	releaseTime = 2 * time.Second
	releasePoll = time.Millisecond
)

// Detach flushes the device and takes its file away. It returns nil only when
// the device is free, or is not this use of it any more. blockdev.ErrBusy, with
// the holders that can be named, while a filesystem on it is mounted in any
// namespace or a process has it open: nothing has changed then.
// blockdev.ErrFailed when the flush failed: the device stays.
func (d Device) Detach(ctx context.Context) error {
	err := d.detach(ctx)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	return blockdev.Op("loop.Detach", "", err)
}

// detach relies on what LOOP_CLR_FD does: the device goes with the last close of
// it; until then it is only marked, and the mark can be taken back.
func (d Device) detach(ctx context.Context) error {
	held, err := sys.DeviceHeld(d.Path)
	if err != nil {
		return err
	}
	if held {
		return d.busy()
	}
	node, err := d.openSame(os.O_RDONLY)
	if err != nil {
		return err
	}
	if err := flush(node); err != nil {
		node.Close()
		return err
	}
	err = sys.LoopClear(node)
	node.Close()
	if errors.Is(err, sys.ErrNoLoop) {
		return nil
	}
	if err != nil {
		return err
	}
	return d.awaitRelease(ctx)
}

// Abandon asks the kernel to take the device away with its last close, and does
// not wait for that: for a device whose users nobody can or wants to end. Not this
// use of the device any more is success.
func (d Device) Abandon() error {
	node, err := d.openSame(os.O_RDONLY)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return blockdev.Op("loop.Abandon", "", err)
	}
	defer node.Close()
	err = sys.LoopClear(node)
	if errors.Is(err, sys.ErrNoLoop) {
		return nil
	}
	return blockdev.Op("loop.Abandon", "", err)
}

func (d Device) awaitRelease(ctx context.Context) error {
	for deadline := time.Now().Add(releaseTime); ; {
		here, err := d.attached()
		if err != nil || !here {
			return err
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			break
		}
		time.Sleep(releasePoll)
	}
	if err := d.Keep(); err != nil {
		return err // not found: it was closed just now
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return d.busy()
}

// attached asks sysfs, which does not count as one more opening of the device.
func (d Device) attached() (bool, error) {
	_, err := os.Stat("/sys/block/" + filepath.Base(d.Path) + "/loop/backing_file")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	sequence, err := sequenceOf(d.Path)
	return sequence == d.Sequence, err
}

func (d Device) busy() error {
	holders := d.Holders()
	if len(holders) == 0 {
		holders = []string{"a process has it open"}
	}
	return fmt.Errorf("%s: %w: %s", d.Path, blockdev.ErrBusy, strings.Join(holders, ", "))
}

// Busy reports whether a filesystem on the device is mounted, in whatever
// namespace, or another exclusive user has it. Processes that merely have it
// open are not seen.
func (d Device) Busy() (bool, error) {
	held, err := sys.DeviceHeld(d.Path)
	return held, blockdev.Op("loop.Busy", "", err)
}

// Holders names, for people, what can be found out about the users of the
// device: live filesystems, mount points in our namespace, stacked devices.
func (d Device) Holders() []string {
	name := filepath.Base(d.Path)
	var holders []string
	live, _ := filepath.Glob("/sys/fs/*/" + name)
	for _, path := range live {
		holders = append(holders, filepath.Base(filepath.Dir(path))+" filesystem")
	}
	stacked, _ := filepath.Glob("/sys/block/" + name + "/holders/*")
	for _, path := range stacked {
		holders = append(holders, "device "+filepath.Base(path))
	}
	return append(holders, mountPoints(d.Path)...)
}

func mountPoints(device string) []string {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var points []string
	for _, line := range strings.Split(string(table), "\n") {
		before, after, ok := strings.Cut(line, " - ")
		fields, source := strings.Fields(before), strings.Fields(after)
		if ok && len(fields) > 4 && len(source) > 1 && source[1] == device {
			points = append(points, "mounted at "+fields[4])
		}
	}
	return points
}

package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// Firecracker takes and gives back drives of a started microVM since 1.16, as a
// developer preview, where it was started with --enable-pci (docs/device-hotplug.md of
// the project). No guest is told of it.
const (
	enablePCI    = "--enable-pci"
	hotplugMajor = 1
	hotplugMinor = 16
)

const (
	closeTime = 2 * time.Second // for Firecracker to close what it has given back
	pollTime  = 5 * time.Millisecond
)

// hotplugs reports whether a VMM takes drives of a started microVM, and gives them back.
func (a *Attacher) hotplugs(t attach.Target, i instance) (bool, error) {
	parts := strings.SplitN(strings.TrimPrefix(i.Version, "v"), ".", 3)
	if len(parts) < 2 {
		return false, nil
	}
	major, err := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	if err != nil || err2 != nil || major < hotplugMajor || major == hotplugMajor && minor < hotplugMinor {
		return false, nil
	}
	return a.door.HasArgument(t, enablePCI)
}

// mayTakeDrives is blockdev.ErrBusy for a microVM that takes no drive now.
func (a *Attacher) mayTakeDrives(t attach.Target, i instance) error {
	if i.State == notStarted {
		return nil
	}
	hot, err := a.hotplugs(t, i)
	if err != nil || hot {
		return err
	}
	return fmt.Errorf("%w: the microVM has been started, and this Firecracker takes drives before that only: attach the volume first, then start it "+
		"(version %d.%d or newer with %s takes them later, too)", blockdev.ErrBusy, hotplugMajor, hotplugMinor, enablePCI)
}

// takeBack makes Firecracker give a drive of a started microVM back, where it can, and
// waits until it has closed the image.
func (a *Attacher) takeBack(ctx context.Context, r attach.Request) error {
	i, err := a.describe(ctx, r.Target)
	if err != nil {
		return err
	}
	hot, err := a.hotplugs(r.Target, i)
	switch {
	case err != nil:
		return err
	case !hot || i.State == notStarted:
		return fmt.Errorf("%w: this Firecracker takes no drive back, before boot neither: end the microVM, and the volume is free at once", blockdev.ErrBusy)
	}
	if err := refusal(a.door.Do(ctx, r.Target, http.MethodDelete, "/drives/"+driveID(r.Volume), nil, nil)); err != nil {
		return err
	}
	waiting, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	for {
		state, err := a.probe(ctx, r)
		if err != nil || state != attach.StateAttached {
			return err
		}
		select {
		case <-waiting.Done():
			return errors.Join(ctx.Err(), fmt.Errorf("%w: Firecracker has given the drive back, and still has its image open", blockdev.ErrBusy))
		case <-time.After(pollTime):
		}
	}
}

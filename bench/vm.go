package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/attach/qmp"
	"holdfast/internal/guest"
	"holdfast/internal/localdaemon"
)

// VM measures volumes in a real guest: how long it takes until the guest has one,
// sees it grown, has lost it; beside the same by hand, on the guest's monitor.
type VM struct {
	Setting               // Rounds: 0: 30; Quick: a smoke test of the bench itself
	Each    time.Duration // of fio; 0: 1 s

	d      *localdaemon.Daemon
	g      *guest.VM
	y      *yardsticks
	report Report
}

const (
	vmVolume  = 64 // MiB
	vmStep    = 16 // MiB that a round grows by
	vmMany    = 32 // volumes in one machine
	vmPorts   = 8  // its root ports
	handDisk  = "hand"
	vmGrown   = 300 * time.Millisecond
	vmAnswers = 5 * time.Millisecond
)

// Run measures everything and cleans up; see Lifecycle.Run.
func (b *VM) Run(ctx context.Context) (report Report, err error) {
	if b.Rounds == 0 {
		b.Rounds = 30
	}
	if b.Each == 0 {
		b.Each = time.Second
	}
	if b.Quick {
		b.Rounds, b.Each = 1, 100*time.Millisecond
	}
	b.report = Report{Name: "Volumes in virtual machines", Time: time.Now().UTC(), Host: hostFacts(b.Dir)}
	defer func() {
		b.report.Host.LoadAfter = load()
		report = b.report
	}()
	if b.g, err = guest.Open(ctx, guest.Options{RootPorts: vmPorts}); err != nil {
		return b.report, err
	}
	b.d, err = localdaemon.Start(ctx, b.Daemon, filepath.Join(b.Dir, "state"), "--pool-size", "8GiB", "--overprovision", overprovision, "--vm-sockets", b.g.Dir)
	if err != nil {
		return b.report, errors.Join(err, b.g.Close())
	}
	defer func() { // the guest before the daemon: what was plugged in by hand is in the pool
		clean := context.WithoutCancel(ctx)
		err = errors.Join(err, b.detachAll(clean), b.g.Close(), b.d.Remove(clean))
	}()
	if b.y, err = newYardsticks(ctx, b.d.State); err != nil {
		return b.report, err
	}
	defer b.y.close()
	for _, measure := range []func(context.Context) error{b.plugs, b.grows, b.many, b.limits, b.paths} {
		if err := measure(ctx); err != nil {
			return b.report, fmt.Errorf("%w\nthe guest's console ends:\n%s", err, b.g.Console())
		}
	}
	b.report.Notes = append(b.report.Notes,
		"The guest's processor is emulated (-accel tcg) and shares two cores with QEMU, the daemon and whoever else works on the machine: its own part of each time is several times what it is with KVM.",
		"By hand: blockdev-add, device_add, block_resize, device_del and blockdev-del over another monitor (QMP) of the same machine, with the same options; nothing of it is recorded anywhere.")
	return b.report, nil
}

func (b *VM) create(ctx context.Context, name string, mebibytes int64) error {
	_, err := b.d.Client.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Size: mebibytes}}, "")
	return err
}

func (b *VM) attach(ctx context.Context, volume string) (client.Attachment, error) {
	return b.d.Client.Attach(ctx, volume, client.Attachment{Holder: "sandbox:bench", Target: client.Target{Type: "qemu", Socket: b.g.Monitor}})
}

// byHand attaches a file or device as the daemon does: at the first free root port
// from one on, else at the SCSI controller.
func (b *VM) byHand(ctx context.Context, serial, driver, path string, port int) error {
	options := func(more qmp.Args) qmp.Args {
		more["discard"], more["cache"] = "unmap", qmp.Args{"direct": true, "no-flush": false}
		return more
	}
	err := b.g.Do(ctx, "blockdev-add", options(qmp.Args{"driver": "raw", "node-name": serial,
		"file": options(qmp.Args{"driver": driver, "filename": path, "aio": "io_uring", "locking": "on"})}))
	if err != nil {
		return err
	}
	device := func(more qmp.Args) qmp.Args {
		more["id"], more["drive"], more["serial"], more["werror"], more["rerror"] = serial, serial, serial, "enospc", "report"
		return more
	}
	for ; port < vmPorts; port++ {
		// With an address a port that is taken is refused; without one QEMU takes a
		// second device, which the guest never sees.
		err := b.g.Do(ctx, "device_add", device(qmp.Args{"driver": "virtio-blk-pci", "bus": fmt.Sprintf("rp%d", port), "addr": "0x0"}))
		var refused *qmp.Error
		if err == nil || !errors.As(err, &refused) {
			return err
		}
	}
	return b.g.Do(ctx, "device_add", device(qmp.Args{"driver": "scsi-hd", "bus": "scsi0.0"}))
}

// handImage makes a formatted image in the pool's filesystem.
func (b *VM) handImage(ctx context.Context, name string, mebibytes int64) (string, error) {
	path := filepath.Join(b.y.dir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Truncate(mebibytes<<20), f.Close()); err != nil {
		return "", err
	}
	return path, command(ctx, "mkfs.ext4", "-q", "-F", path)
}

// seen waits for the next line of a script and tells how long after start it came.
func seen(s *guest.Script, start time.Time, to *samples) error {
	line, err := s.Next()
	if err == nil {
		*to = append(*to, line.At.Sub(start))
	}
	return err
}

// plugTimes are the samples of attaching and detaching.
type plugTimes struct{ answer, seen, detach samples }

// plugs: hot attach until the guest has the disk, and detach.
func (b *VM) plugs(ctx context.Context) error {
	b.say("attach and detach, %d rounds", b.Rounds)
	if err := b.create(ctx, "plugged", vmVolume); err != nil {
		return err
	}
	first, err := b.attach(ctx, "plugged") // the serial, and what only the first time costs
	if err != nil {
		return err
	}
	if _, err := b.d.Client.Detach(ctx, "plugged", first.ID); err != nil {
		return err
	}
	image, err := b.handImage(ctx, "plugged", vmVolume)
	if err != nil {
		return err
	}
	var ours, hand plugTimes
	for range b.Rounds {
		var at client.Attachment
		err := errors.Join(
			b.plug(ctx, &ours, first.Serial, func() (err error) {
				at, err = b.attach(ctx, "plugged")
				return err
			}, func() error {
				_, err := b.d.Client.Detach(ctx, "plugged", at.ID)
				return err
			}),
			b.plug(ctx, &hand, handDisk, func() error { return b.byHand(ctx, handDisk, "file", image, 0) },
				func() error { return b.g.Unplug(ctx, handDisk) }))
		if err != nil {
			return err
		}
	}
	b.row("hot attach, the daemon's answer", ours.answer, "blockdev-add, device_add by hand", hand.answer, 0, "")
	b.row("hot attach → seen by the guest", ours.seen, "the same by hand", hand.seen, 0, "")
	b.row("detach, durable", ours.detach, "device_del, DEVICE_DELETED, blockdev-del by hand", hand.detach, 0, "the guest had not mounted it")
	return nil
}

func (b *VM) plug(ctx context.Context, t *plugTimes, serial string, attach, detach func() error) error {
	watch, err := b.g.Watch(ctx, serial, 0, "")
	if err != nil {
		return err
	}
	defer watch.Close()
	start := time.Now()
	if err := t.answer.time(attach); err != nil {
		return err
	}
	if err := seen(watch, start, &t.seen); err != nil {
		return err
	}
	return t.detach.time(detach)
}

// growTimes are the samples of growth.
type growTimes struct{ answer, device, filesystem samples }

// grows: a mounted volume grows; the guest sees it and grows the filesystem.
func (b *VM) grows(ctx context.Context) error {
	b.say("growth, %d rounds", b.Rounds)
	if err := b.create(ctx, "grown", vmVolume); err != nil {
		return err
	}
	at, err := b.attach(ctx, "grown")
	if err != nil {
		return err
	}
	image, err := b.handImage(ctx, "grown", vmVolume)
	if err == nil {
		err = b.byHand(ctx, handDisk, "file", image, 0)
	}
	if err != nil {
		return err
	}
	var ours, hand growTimes
	mounted := []string{at.Serial, handDisk}
	for _, serial := range mounted {
		node, err := b.g.Disk(ctx, serial)
		if err != nil {
			return err
		}
		if err := b.g.Run(ctx, "sh", "-c", "mkdir -p /mnt/"+serial+" && mount "+node+" /mnt/"+serial); err != nil {
			return err
		}
	}
	for n := range int64(b.Rounds) {
		size := vmVolume + (n+1)*vmStep
		err := errors.Join(
			b.grow(ctx, &ours, at.Serial, size<<20, func() error {
				_, err := b.d.Client.UpdateVolume(ctx, "grown", client.VolumeChange{SizeMiB: &size})
				return err
			}),
			b.grow(ctx, &hand, handDisk, size<<20, func() error {
				if err := os.Truncate(image, size<<20); err != nil {
					return err
				}
				return b.g.Do(ctx, "block_resize", qmp.Args{"node-name": handDisk, "size": size << 20})
			}))
		if err != nil {
			return err
		}
	}
	b.row("grow a mounted volume: the host's part, durable", ours.answer, "truncate and block_resize by hand, not durable", hand.answer, vmAnswers, "")
	b.row("grow → the guest sees the device", ours.device, "the same by hand", hand.device, 0, "")
	b.row("grow → ext4 has grown in the guest", ours.filesystem, "the same by hand", hand.filesystem, vmGrown, "of it, resize2fs in the guest "+fmt.Sprintf("%.0f ms", milliseconds(ours.filesystem.median()-ours.device.median())))
	for _, serial := range mounted {
		if err := b.g.Run(ctx, "umount", "/mnt/"+serial); err != nil {
			return err
		}
	}
	_, err = b.d.Client.Detach(ctx, "grown", at.ID)
	return errors.Join(err, b.g.Unplug(ctx, handDisk))
}

func (b *VM) grow(ctx context.Context, t *growTimes, serial string, size int64, grow func() error) error {
	watch, err := b.g.Watch(ctx, serial, size, "resize2fs $D >/dev/null 2>&1 && echo grown")
	if err != nil {
		return err
	}
	defer watch.Close()
	start := time.Now()
	if err := t.answer.time(grow); err != nil {
		return err
	}
	return errors.Join(seen(watch, start, &t.device), seen(watch, start, &t.filesystem))
}

// many: one machine gets 32 volumes, eight at root ports, the others at its SCSI
// controller.
func (b *VM) many(ctx context.Context) error {
	rounds := max(1, b.Rounds/10)
	b.say("%d volumes in one machine, %d rounds", vmMany, rounds)
	var names, images []string
	for n := range vmMany {
		names = append(names, fmt.Sprintf("many-%02d", n))
		image, err := b.handImage(ctx, names[n], 16)
		if err := errors.Join(err, b.create(ctx, names[n], 16)); err != nil {
			return err
		}
		images = append(images, image)
	}
	var ours, hand plugTimes
	for range rounds {
		ids := make([]string, vmMany)
		var serials []string
		err := b.crowd(ctx, &ours, func(n int) (string, error) {
			at, err := b.attach(ctx, names[n])
			ids[n] = at.ID
			serials = append(serials, at.Serial)
			return at.Serial, err
		}, func(n int) error {
			_, err := b.d.Client.Detach(ctx, names[n], ids[n])
			return err
		})
		if err != nil {
			return err
		}
		err = b.crowd(ctx, &hand, func(n int) (string, error) {
			return names[n], b.byHand(ctx, names[n], "file", images[n], n)
		}, func(n int) error { return b.g.Unplug(ctx, names[n]) })
		if err != nil {
			return err
		}
	}
	b.row(fmt.Sprintf("attach of %d volumes to one machine, one after the other, answered", vmMany), ours.answer, "by hand", hand.answer, 0, "")
	b.row("→ all seen by the guest", ours.seen, "by hand", hand.seen, 0, "")
	b.row("detach of all of them", ours.detach, "by hand", hand.detach, 0, "")
	return nil
}

// crowd attaches all, waits until the guest has them, and detaches all.
func (b *VM) crowd(ctx context.Context, t *plugTimes, attach func(n int) (serial string, err error), detach func(n int) error) error {
	var serials []string
	start := time.Now()
	for n := range vmMany {
		serial, err := attach(n)
		if err != nil {
			return err
		}
		serials = append(serials, serial)
	}
	t.answer = append(t.answer, time.Since(start))
	if err := b.g.Run(ctx, append([]string{"/init", "disks"}, serials...)...); err != nil {
		return err
	}
	t.seen = append(t.seen, time.Since(start))
	return t.detach.time(func() error {
		for n := range vmMany {
			if err := detach(n); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *VM) row(what string, s samples, yardstick string, beside samples, goal time.Duration, note string) {
	r := Row{Measure: what, Unit: "ms", Samples: len(s), P50: milliseconds(s.median()), P99: milliseconds(s.quantile(0.99)),
		Yardstick: yardstick, Beside: milliseconds(beside.median()), Ratio: pairedRatio(s, beside), Note: note}
	fastest := fmt.Sprintf("the fastest tenth, which others' work disturbs least: %.1f ms, of the yardstick %.1f ms", milliseconds(s.quantile(0.1)), milliseconds(beside.quantile(0.1)))
	if r.Note != "" {
		r.Note += "; "
	}
	r.Note += fastest
	if goal > 0 {
		r.Goal, r.Met = fmt.Sprintf("≤ %d ms", goal.Milliseconds()), s.median() <= goal
	}
	b.report.Rows = append(b.report.Rows, r)
}

func (b *VM) detachAll(ctx context.Context) error {
	var errs []error
	for v, err := range b.d.Client.Volumes(ctx, client.VolumeQuery{}) {
		if err != nil {
			return err
		}
		for _, at := range v.State.Attachments {
			_, err := b.d.Client.Detach(ctx, v.Metadata.Name, at.ID)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

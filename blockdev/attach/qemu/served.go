package qemu

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qmp"
)

// lineName is that of the character device by which QEMU talks to a volume's worker: of
// each opening another one, as its socket's name is.
func lineName(r attach.Request) string {
	opening := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(r.Endpoint.Path), "data-"), ".sock")
	return linesOf(r.Volume) + "-" + opening
}

// linesOf begins the names of a volume's character devices, and was all of them once.
func linesOf(id blockdev.ID) string { return "holdfast-line-" + string(id) }

// pollTime is between two looks at what QEMU is doing.
const pollTime = 5 * time.Millisecond

// sharesMemory reports whether all of the guest's memory is in files that QEMU can hand
// to a worker. Memory that a worker does not have would be found out by a guest's
// request only.
func (m *machine) sharesMemory(ctx context.Context) (bool, error) {
	var all []struct {
		ID    string
		Share bool
	}
	if err := m.ask(ctx, "query-memdev", qmp.Args{}, &all); err != nil {
		return false, err
	}
	objects, err := m.list(ctx, "/objects")
	if err != nil {
		return false, err
	}
	for _, memory := range all {
		inFile := slices.ContainsFunc(objects, func(o object) bool {
			return o.Name == memory.ID && slices.Contains([]string{"child<memory-backend-memfd>", "child<memory-backend-file>", "child<memory-backend-shm>"}, o.Type)
		})
		if !memory.Share || !inFile {
			return false, nil
		}
	}
	return len(all) > 0, nil
}

// plugServed makes the line to the worker and the device. It takes back what it made
// when it fails. The mode and the limits are the worker's.
func (m *machine) plugServed(ctx context.Context, r attach.Request) error {
	n, err := m.node(ctx, nodeName(r.Volume))
	if err != nil {
		return err
	}
	if n != nil {
		return busy("the virtual machine has the volume as a file or device")
	}
	there, err := m.hasDevice(ctx, deviceName(r.Volume))
	if err == nil && there {
		if there, err = m.isLedBy(ctx, r); err == nil && !there {
			err = m.unplugLeft(ctx, r.Volume)
		}
	}
	if err != nil || there {
		return err
	}
	if err = m.callWorker(ctx, r); err == nil {
		err = m.addServed(ctx, r)
	}
	if err != nil {
		return errors.Join(err, m.hangUp(context.WithoutCancel(ctx), r.Volume))
	}
	return nil
}

// line is a character device of a machine.
type line struct {
	Label    string
	Filename string // "disconnected:unix:PATH" until the worker answers
}

func (l line) connected() bool { return !strings.HasPrefix(l.Filename, "disconnected:") }

// lines are those of a volume, also of openings that have ended.
func (m *machine) lines(ctx context.Context, id blockdev.ID) (all []line, err error) {
	err = m.ask(ctx, "query-chardev", qmp.Args{}, &all)
	return slices.DeleteFunc(all, func(l line) bool {
		return l.Label != linesOf(id) && !strings.HasPrefix(l.Label, linesOf(id)+"-")
	}), err
}

// line is that of a request's opening, nil for none.
func (m *machine) line(ctx context.Context, r attach.Request) (*line, error) {
	all, err := m.lines(ctx, r.Volume)
	at := slices.IndexFunc(all, func(l line) bool { return l.Label == lineName(r) })
	if err != nil || at < 0 {
		return nil, err
	}
	return &all[at], nil
}

// isLedBy reports whether the volume's device is on the line of a request's opening. One that is
// not was taken away by force, and its guest has not let it go since.
func (m *machine) isLedBy(ctx context.Context, r attach.Request) (bool, error) {
	var label string
	if err := m.ask(ctx, "qom-get", qmp.Args{"path": "/machine/peripheral/" + deviceName(r.Volume), "property": "chardev"}, &label); err != nil {
		return false, err
	}
	if label != linesOf(r.Volume) { // named by a daemon of before: QEMU tells where it leads while it leads nowhere
		return label == lineName(r), nil
	}
	all, err := m.lines(ctx, r.Volume)
	return slices.ContainsFunc(all, func(l line) bool {
		return l.Label == label && (l.connected() || strings.Contains(l.Filename, r.Endpoint.Path))
	}), err
}

// unplugLeft takes away a device that leads nowhere.
func (m *machine) unplugLeft(ctx context.Context, id blockdev.ID) error {
	err := m.unplug(ctx, id)
	if errors.Is(err, blockdev.ErrBusy) {
		return busy("the virtual machine still has the device of this volume that was taken from it by force: %s", err.Error())
	}
	return err
}

// callWorker connects QEMU to the worker, and again whenever that is replaced. The
// device is made only on a line that stands: QEMU would hang in device_add, and the
// guest with it, until somebody answers.
func (m *machine) callWorker(ctx context.Context, r attach.Request) error {
	l, err := m.line(ctx, r)
	if err != nil {
		return err
	}
	if l == nil {
		if err := m.addLine(ctx, r); err != nil {
			return err
		}
	}
	waiting, cancel := context.WithTimeout(ctx, m.o.Answer)
	defer cancel()
	for {
		l, err := m.line(ctx, r)
		if err != nil {
			return err
		}
		if l != nil && l.connected() {
			return nil
		}
		select {
		case <-waiting.Done():
			if err := ctx.Err(); err != nil {
				return err
			}
			return busy("the virtual machine's process gets no connection to the volume's worker: it needs access to the directory of workers")
		case <-time.After(pollTime):
		}
	}
}

// addLine makes the character device. The name of one that was taken away is free only when
// QEMU's last try to connect it has ended, which goes on beside: until then QEMU speaks of a
// duplicate yank instance.
func (m *machine) addLine(ctx context.Context, r attach.Request) error {
	waiting, cancel := context.WithTimeout(ctx, m.o.Answer)
	defer cancel()
	for {
		err := m.tryLine(ctx, r)
		if why := refused(err); why == nil || !strings.Contains(why.Desc, "yank instance") {
			return err
		}
		select {
		case <-waiting.Done():
			return err
		case <-time.After(pollTime):
		}
	}
}

// tryLine is addLine, once. What the device is told of the time between two tries is named
// otherwise since QEMU 9.2.
func (m *machine) tryLine(ctx context.Context, r attach.Request) error {
	var failure error
	for _, pause := range []qmp.Args{{"reconnect": 1}, {"reconnect-ms": 1000}} {
		data := qmp.Args{"addr": qmp.Args{"type": "unix", "data": qmp.Args{"path": r.Endpoint.Path}}, "server": false}
		maps.Copy(data, pause)
		_, err := m.Do(ctx, "chardev-add", qmp.Args{"id": lineName(r), "backend": qmp.Args{"type": "socket", "data": data}})
		if err == nil {
			return nil
		}
		failure = refusal(err)
		if why := refused(err); why == nil || !strings.Contains(why.Desc, "reconnect") {
			break
		}
	}
	return failure
}

// addServed plugs the worker's disk in at the first port that takes it, with a queue for
// each processor as far as the worker has them.
func (m *machine) addServed(ctx context.Context, r attach.Request) error {
	places, err := m.ports(ctx)
	if err != nil {
		return err
	}
	return plugIn(places, func(p place) error {
		args := maps.Clone(p.args)
		maps.Copy(args, qmp.Args{"driver": "vhost-user-blk-pci", "id": deviceName(r.Volume), "chardev": lineName(r)})
		_, err := m.Do(ctx, "device_add", args)
		if most := queuesOf(err); most > 0 {
			args["num-queues"] = most
			_, err = m.Do(ctx, "device_add", args)
		}
		return err
	})
}

// queuesOf is the number of queues that a worker has, when QEMU refused a device that
// has more; else 0.
func queuesOf(err error) (most int) {
	const before = "maximum number of queues supported by the backend is "
	if why := refused(err); why != nil {
		if _, number, found := strings.Cut(why.Desc, before); found {
			_, _ = fmt.Sscanf(number, "%d", &most)
		}
	}
	return most
}

// hangUp takes a volume's lines to workers away.
func (m *machine) hangUp(ctx context.Context, id blockdev.ID) error {
	all, err := m.lines(ctx, id)
	if err != nil {
		return err
	}
	for _, one := range all {
		there := func() (bool, error) {
			now, err := m.lines(ctx, id)
			return slices.ContainsFunc(now, func(l line) bool { return l.Label == one.Label }), err
		}
		if err := m.letGo(ctx, "its connection to the volume's worker", there, "chardev-remove", qmp.Args{"id": one.Label}); err != nil {
			return err
		}
	}
	return nil
}

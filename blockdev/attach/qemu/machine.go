package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qmp"
)

// Serial is the serial number that a volume's device has in the guest: the last 20
// characters of the volume's id, which are as many as virtio-blk has room for
// (VIRTIO_BLK_ID_BYTES) and all of the id's randomness. There it is
// /dev/disk/by-id/virtio-SERIAL, or scsi-0QEMU_QEMU_HARDDISK_SERIAL, and
// /sys/block/*/serial.
func Serial(id blockdev.ID) string { return string(id[max(len(id)-20, 0):]) }

// The names of what is ours in a machine. A node's has room for 31 characters
// (BlockDriverState.node_name).
func nodeName(id blockdev.ID) string { return "hf-" + strings.TrimPrefix(string(id), "vol-") }

func deviceName(id blockdev.ID) string { return "holdfast-" + string(id) }

// machine is a virtual machine's monitor.
type machine struct {
	*qmp.Monitor
	o Options
}

// Do is the monitor's, bounded: one whose process stands still, or hangs in the
// command, is blockdev.ErrBusy. Whether the command was carried out is then not known.
func (m *machine) Do(ctx context.Context, command string, args qmp.Args) (json.RawMessage, error) {
	bounded, cancel := context.WithTimeout(ctx, m.o.Command)
	defer cancel()
	answer, err := m.Monitor.Do(bounded, command, args)
	if err != nil && ctx.Err() == nil && bounded.Err() != nil {
		return nil, busy("the monitor has not answered to %s within %s: QEMU is stopped, or hangs in it", command, m.o.Command)
	}
	return answer, err
}

func (m *machine) ask(ctx context.Context, command string, args qmp.Args, into any) error {
	answer, err := m.Do(ctx, command, args)
	if err != nil {
		return refusal(err)
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// peripherals tells the devices that have names, and their types.
func (m *machine) peripherals(ctx context.Context) ([]object, error) {
	return m.list(ctx, "/machine/peripheral")
}

// list tells what is at a path of QEMU's object tree.
func (m *machine) list(ctx context.Context, path string) (all []object, err error) {
	return all, m.ask(ctx, "qom-list", qmp.Args{"path": path}, &all)
}

type object struct{ Name, Type string } // Type: "child<virtio-blk-pci>"

func (m *machine) has(ctx context.Context, path, name string) (bool, error) {
	all, err := m.list(ctx, path)
	return slices.ContainsFunc(all, func(o object) bool { return o.Name == name }), err
}

func (m *machine) hasDevice(ctx context.Context, name string) (bool, error) {
	return m.has(ctx, "/machine/peripheral", name)
}

// node is a block node; nil for none of that name.
type node struct {
	Name     string `json:"node-name"`
	Driver   string `json:"drv"`
	ReadOnly bool   `json:"ro"`
}

func (m *machine) node(ctx context.Context, name string) (*node, error) {
	var all []node
	if err := m.ask(ctx, "query-named-block-nodes", qmp.Args{"flat": true}, &all); err != nil {
		return nil, err
	}
	for _, n := range all {
		if n.Name == name {
			return &n, nil
		}
	}
	return nil, nil
}

// place is where a device can be plugged in, as arguments of device_add. A root port
// takes one device, at address 0: QEMU would put a second one where no guest looks.
type place struct{ args qmp.Args }

// places tells where there is room: first free root ports, whose devices are the
// faster ones, then virtio-scsi controllers. blockdev.ErrBusy for nowhere.
func (m *machine) places(ctx context.Context) ([]place, error) {
	all, err := m.peripherals(ctx)
	if err != nil {
		return nil, err
	}
	found, err := m.freePorts(ctx, all)
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		if strings.HasPrefix(p.Type, "child<virtio-scsi-pci") {
			found = append(found, place{qmp.Args{"driver": "scsi-hd", "bus": p.Name + ".0"}})
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	return nil, busy("the virtual machine has no room for another disk: no free pcie-root-port with an id, and no virtio-scsi controller with one. " +
		"Detach another volume, or start it with more (-device pcie-root-port,id=NAME or -device virtio-scsi-pci,id=NAME)")
}

// ports is places without controllers, which take only what QEMU itself reads and
// writes.
func (m *machine) ports(ctx context.Context) ([]place, error) {
	all, err := m.peripherals(ctx)
	if err != nil {
		return nil, err
	}
	found, err := m.freePorts(ctx, all)
	if err == nil && len(found) == 0 {
		err = busy("the virtual machine has no room for a disk that a worker serves: no free pcie-root-port with an id. " +
			"Detach another volume, or start it with more (-device pcie-root-port,id=NAME)")
	}
	return found, err
}

func (m *machine) freePorts(ctx context.Context, among []object) (found []place, err error) {
	for _, p := range among {
		if p.Type != "child<pcie-root-port>" {
			continue
		}
		free, err := m.isFree(ctx, p.Name)
		if err != nil {
			return nil, err
		}
		if free {
			found = append(found, place{qmp.Args{"driver": "virtio-blk-pci", "bus": p.Name, "addr": "0"}})
		}
	}
	return found, nil
}

// isFree reports whether a root port has nothing behind it. The object tree knows that
// before the machine's firmware has looked at its buses, and query-pci does not.
func (m *machine) isFree(ctx context.Context, port string) (bool, error) {
	behind, err := m.list(ctx, "/machine/peripheral/"+port+"/"+port) // the bus has the port's id
	if isRefusal(err) {                                              // device_add will tell
		return true, nil
	}
	return err == nil && !slices.ContainsFunc(behind, func(o object) bool { return strings.HasPrefix(o.Name, "child[") }), err
}

// plug makes the node and the device. It takes back what it made when it fails.
func (m *machine) plug(ctx context.Context, r attach.Request) error {
	n, err := m.node(ctx, nodeName(r.Volume))
	if err != nil {
		return err
	}
	if n != nil && n.ReadOnly != r.ReadOnly {
		return busy("the virtual machine has the volume in another mode")
	}
	there, err := m.hasDevice(ctx, deviceName(r.Volume))
	if err != nil {
		return err
	}
	switch {
	case there && n == nil: // it was served, and its image is a file by now: that worker has ended
		err = m.unplugLeft(ctx, r.Volume)
	case there:
		return m.limit(ctx, r)
	}
	switch {
	case err != nil:
		return err
	case n == nil:
		err = m.addNode(ctx, r)
	default: // an earlier life of the daemon made it
		err = m.limit(ctx, r)
	}
	if err == nil {
		err = m.addDevice(ctx, r.Volume)
	}
	if err != nil {
		return errors.Join(err, m.closeNode(context.WithoutCancel(ctx), r.Volume))
	}
	return nil
}

// addNode opens the image, below a filter that bounds what passes: with the first way
// of doing I/O that QEMU and its host have.
func (m *machine) addNode(ctx context.Context, r attach.Request) error {
	if err := m.makeGroup(ctx, r); err != nil {
		return err
	}
	driver := "file"
	if r.Endpoint.Kind == blockdev.Block {
		driver = "host_device"
	}
	// Zeroes that a guest writes are written: they must keep the space that a volume
	// was given in advance (detect-zeroes is off by default).
	options := func(more qmp.Args) qmp.Args {
		more["read-only"], more["discard"] = r.ReadOnly, "unmap"
		more["cache"] = qmp.Args{"direct": true, "no-flush": false}
		return more
	}
	var failures error
	for _, aio := range m.o.AIO.ways() {
		_, err := m.Do(ctx, "blockdev-add", options(qmp.Args{
			"driver": "throttle", "node-name": nodeName(r.Volume), "throttle-group": groupName(r.Volume),
			"file": options(qmp.Args{
				"driver": "raw",
				"file":   options(qmp.Args{"driver": driver, "filename": r.Endpoint.Path, "aio": string(aio), "locking": "on"}),
			}),
		}))
		if err == nil {
			return nil
		}
		failures = refusal(err)
		if !lacksAIO(err, aio) {
			break
		}
	}
	return failures
}

// addDevice plugs the node in at the first place that takes it: one that was free a
// moment ago may be taken by now.
func (m *machine) addDevice(ctx context.Context, id blockdev.ID) error {
	places, err := m.places(ctx)
	if err != nil {
		return err
	}
	return plugIn(places, func(p place) error {
		args := qmp.Args{
			"id": deviceName(id), "drive": nodeName(id), "serial": Serial(id),
			// A write that finds no space stops the guest, which loses nothing and goes on
			// (cont) when there is some; other errors are the guest's to handle.
			"werror": "enospc", "rerror": "report",
		}
		maps.Copy(args, p.args)
		_, err := m.Do(ctx, "device_add", args)
		return err
	})
}

// plugIn tries places until one takes the device. When none does, it gives the refusal
// of the last.
func plugIn(places []place, add func(place) error) (err error) {
	for _, p := range places {
		if err = add(p); err == nil || !isRefusal(err) {
			return err
		}
	}
	return refusal(err)
}

// unplug asks the guest to let the device go, waits for it, and closes the image.
func (m *machine) unplug(ctx context.Context, id blockdev.ID) error {
	waiting, cancel := context.WithTimeout(ctx, m.o.Wait)
	defer cancel()
	there, err := m.hasDevice(ctx, deviceName(id))
	if err == nil && there {
		err = m.removeDevice(ctx, waiting, deviceName(id))
	}
	if err != nil {
		return err
	}
	return errors.Join(m.hangUp(ctx, id), m.closeNode(ctx, id))
}

func (m *machine) removeDevice(ctx, waiting context.Context, name string) error {
	mark := m.Mark()
	_, err := m.Do(ctx, "device_del", qmp.Args{"id": name})
	switch r := refused(err); {
	case r != nil && r.Class == deviceNotFound:
		return nil
	case r != nil && strings.Contains(r.Desc, "already in the process of unplug"):
	case err != nil:
		return refusal(err)
	}
	event, err := m.Wait(waiting, mark, func(e qmp.Event) bool {
		var about struct{ Device string }
		return (e.Name == "DEVICE_DELETED" || e.Name == "DEVICE_UNPLUG_GUEST_ERROR") &&
			json.Unmarshal(e.Data, &about) == nil && about.Device == name
	})
	switch {
	case err != nil && ctx.Err() == nil && waiting.Err() != nil:
		return m.silent(ctx)
	case err != nil:
		return err
	case event.Name != "DEVICE_DELETED":
		return busy("the guest refuses to let the device go")
	}
	return nil
}

// silent says why a guest may not have answered.
func (m *machine) silent(ctx context.Context) error {
	var status struct {
		Running bool
		Status  string
	}
	if err := m.ask(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if !status.Running {
		return busy("the guest was asked to let the device go and is not running (%s)", status.Status)
	}
	return busy("the guest was asked to let the device go and has not answered within %s", m.o.Wait)
}

// closeNode closes the image, and removes what bounded it.
func (m *machine) closeNode(ctx context.Context, id blockdev.ID) error {
	there := func() (bool, error) { n, err := m.node(ctx, nodeName(id)); return n != nil, err }
	err := m.letGo(ctx, "the image open", there, "blockdev-del", qmp.Args{"node-name": nodeName(id)})
	if err != nil {
		return err
	}
	return m.dropGroup(ctx, id)
}

// letGo removes what is there. A device that was deleted a moment ago may hold it for a
// moment more.
func (m *machine) letGo(ctx context.Context, what string, there func() (bool, error), command string, args qmp.Args) error {
	waiting, cancel := context.WithTimeout(ctx, m.o.Wait)
	defer cancel()
	for {
		if is, err := there(); err != nil || !is {
			return err
		}
		_, err := m.Do(ctx, command, args)
		if err == nil || !isRefusal(err) {
			return err
		}
		select {
		case <-waiting.Done():
			return busy("the virtual machine keeps %s: %s", what, refusal(err).Error())
		case <-time.After(pollTime):
		}
	}
}

// resize tells the guest the size that the image has. QEMU resizes no disk that is
// read-only: a reader sees it at its next attach.
func (m *machine) resize(ctx context.Context, r attach.Request) error {
	if r.ReadOnly {
		return nil
	}
	_, err := m.Do(ctx, "block_resize", qmp.Args{"node-name": nodeName(r.Volume), "size": r.Endpoint.Size})
	return refusal(err)
}

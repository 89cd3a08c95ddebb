package engine

import "holdfast/blockdev/filesystem"

// action is the one thing that is next for a volume.
type action string

const (
	actNothing  action = "nothing"
	actAllocate action = "allocate" // make the draft, filled or empty, and publish it
	actAdopt    action = "adopt"    // the image is published: the record follows it
	actRemove   action = "remove"   // take mounts, device and image away, then the record
	actMissing  action = "missing"  // a ready volume without an image: failed, never dropped
	actDevice   action = "device"   // grow the device to the wanted size
	actTell     action = "tell"     // tell sandboxes that do not see it by themselves how large the device is
	actInside   action = "inside"   // grow the filesystem to the device, by the agent in the guest
	actOffline  action = "offline"  // grow the unmounted filesystem to the device
	actMounted  action = "mounted"  // grow the mounted filesystem to the device
	actNote     action = "note"     // a guest has grown it, or this host has: nothing is left to a guest
)

// facts are what the pool and the kernel say of a volume; they are asked, never stored.
type facts struct {
	published  bool
	device     int64 // bytes
	filesystem int64 // bytes; meaningful for published images with a filesystem
	mounted    bool
	raw        bool   // in use by sandboxes that have the device itself, and by nobody else
	inside     bool   // an agent in a guest can work on the filesystem
	ours       bool   // a guest has written it, nobody has it, and it is an ext4 that this host may grow
	strange    string // why it is not, of one that should be
	untold     bool   // one of them does not know the device's size
	filled     bool   // growing to this device size has already been done: what is left over is of no use to the filesystem
}

// step names the next action. It is pure: the loop in settle takes it and asks
// again, so what a crash left half-done is found and finished.
//
//	Allocating ─► Hydrating ─► Ready ─► Deleting ─► (gone)
//	                             │ wanted > device     ⇒ grow the device
//	                             │ device > told       ⇒ tell the virtual machines
//	                             │ device > filesystem ⇒ grow the filesystem
func step(v Volume, f facts) action {
	switch v.Phase {
	case Deleting:
		return actRemove
	case Allocating, Hydrating:
		if f.published {
			return actAdopt
		}
		return actAllocate
	}
	switch {
	case !f.published:
		return actMissing
	case v.moving(): // its bytes stay as they are
		return actNothing
	case f.device < v.bytes():
		return actDevice
	case f.untold:
		return actTell
	case f.inside && v.Filesystem != filesystem.None && v.SizeMiB > v.GuestMiB:
		return actInside
	case v.Filesystem == filesystem.None || v.Tainted && !f.ours || f.raw:
		return actNothing
	case v.Tainted && !v.CheckFirst && !outgrown(f):
		return actNote
	case v.CheckFirst && !f.mounted:
		return actOffline
	case outgrown(f) && f.mounted:
		return actMounted
	case outgrown(f):
		return actOffline
	}
	return actNothing
}

// outgrown reports whether the filesystem leaves room on the device that it
// could use. Filesystems round down to their own units: what is below a MiB, or
// was left over by a growth that succeeded, is not room.
func outgrown(f facts) bool { return !f.filled && f.device-f.filesystem >= filesystem.MiB }

package vmsocket

import (
	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// KindsFor are the kinds of endpoint that a resolved target's machine can use, best
// first: its VMM does its own I/O on a file or device, and asks a worker where there is
// none, or where the target wants it. A worker needs the guest's memory.
func KindsFor(t attach.Target) []blockdev.Kind {
	kinds := []blockdev.Kind{blockdev.File, blockdev.Block}
	switch {
	case t.Transport == string(blockdev.VhostUser):
		return []blockdev.Kind{blockdev.VhostUser}
	case t.Shared:
		return append(kinds, blockdev.VhostUser)
	}
	return kinds
}

// Private refuses a target that wants a worker for a machine whose memory it cannot
// get; how says how a machine is started that shares its memory.
func Private(t attach.Target, how string) error {
	if t.Transport == "" || t.Shared {
		return nil
	}
	return invalid("target.transport is %q, and the virtual machine's memory cannot be shared with the volume's worker: start it with %s", t.Transport, how)
}

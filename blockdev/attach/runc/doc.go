// Package runc attaches volumes to running runc containers: into the mount
// namespace of the container and out of it again, without a restart.
//
// A container is named once, by id, in Resolve; from then on it is a process:
// pid, start time and boot, so that another process with the same pid is never
// touched. "Gone" is said only with proof: the process has ended, or its pid
// belongs to another process, or the machine has booted since.
//
// The mount is made by descriptor: a clone of the stage's mount (open_tree) is
// put (move_mount) on a directory that was walked to, inside the namespace,
// without following any symbolic link. A tenant who swaps names meanwhile can
// lose the volume in his own container, and reach nothing outside it.
//
// In a container with a user namespace the mount maps owners (an idmapped
// mount), so a volume has the same owners in whatever sandbox it is.
//
// A sandbox with CAP_SYS_ADMIN (over its own user namespace suffices) can mount
// the volume at more places, in namespaces of its own, and writable where
// Request.ReadOnly made it read-only: only a read-only device is beyond its
// reach. Detach finds the other places in the container's namespace; those in
// namespaces below it are found by the stage, whose Unmount waits for the
// kernel to let the filesystem go.
package runc

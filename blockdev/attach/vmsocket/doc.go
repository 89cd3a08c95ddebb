// Package vmsocket finds the process behind a virtual machine monitor's API
// socket, and holds on to it.
//
// A target names a unix socket below a directory that the operator allows. No
// symbolic link on the way is followed. The process is the one that listens
// (SO_PEERCRED), remembered by pid, start time and boot id; each later connection
// must reach the same one, so a socket that somebody else has bound since is never
// taken for the VMM's. The end of the VMM is told by a pidfd, and what it still has
// open by its /proc/pid/fd: a volume has left a VMM when no descriptor of the
// process means its image, whatever the VMM's API says.
package vmsocket

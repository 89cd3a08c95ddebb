// Package qmp speaks the QEMU Machine Protocol, the JSON protocol of QEMU's and
// qemu-storage-daemon's monitors: commands with answers, and events in between.
// https://www.qemu.org/docs/master/interop/qmp-spec.html
package qmp

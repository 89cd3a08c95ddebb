// Command holdfast-guest is the agent inside a virtual machine: it does with the
// filesystems of volumes what only the guest may, when the host's daemon asks.
//
// It listens on the virtio-serial port io.holdfast.guest.0, found without udev, and
// with --vsock on a vsock port, where it answers nobody but the host. The protocol
// is blockdev/attach/guest's. It needs no tool in the guest: mounting, growing and
// the rest are system calls.
//
// It acts on disks by their serial numbers only, keeps nothing in memory that it
// needs after a restart, and a filesystem that it froze thaws after the time that
// the host named, or at its next start, whatever becomes of the host.
package main

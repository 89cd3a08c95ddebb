// Package firecracker attaches volumes to Firecracker microVMs by their API socket:
// target {type: "firecracker", socket}, below a directory that the operator allows.
//
// Firecracker takes drives before a microVM boots, and takes none back (its published
// API has PUT and PATCH of /drives, the first before boot only, and no DELETE). So a
// volume is attached before boot, and is detached when the VMM's process has ended;
// both are refused otherwise, with the reason. The exception is hot-plug, a developer
// preview since 1.16 with --enable-pci, where PUT and DELETE work later as well: no
// guest is told, so it rescans its PCI bus after an attach (/sys/bus/pci/rescan), and
// removes the device from it before a detach. After growth the drive is read again;
// the API does not tell when the guest has seen it.
//
// Every drive is given cache_type Writeback: by Firecracker's default, Unsafe, a
// guest's flushes are not offered and what it has written durably can be lost.
// Firecracker knows raw images only and probes nothing. It locks nothing either: the
// lock beside the image is the daemon's.
//
// A VMM in a jail must see the image at the daemon's own path, by a bind mount say:
// it is compared by inode, and refused where it does not. A microVM that is restored
// from a snapshot opens the images of its snapshot by path, past this daemon: do not
// restore one whose volumes were detached since.
package firecracker

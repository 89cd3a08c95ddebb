// Package qemu attaches volumes to running QEMU virtual machines by QMP: target
// {type: "qemu", socket}, a monitor's socket below one of a few prefixes that the
// operator allows.
//
// A machine is named once, by the socket, in Resolve; from then on it is a process:
// the one that the kernel says listens there, with its start time and boot. "Gone"
// is said only with proof: that process has ended. A monitor of another process is
// never spoken to.
//
// The volume is a throttle group, a block node and a device, whose names have our mark
// and the volume's id, so each step finds what an earlier life of the daemon has made.
// The node is a filter of that group over the raw image: rates can be bounded at any
// time, and are until the node is closed. The
// device is virtio-blk on a free pcie-root-port, or a disk of a virtio-scsi
// controller when no port is free. The guest finds it by its serial number, see
// Serial. The format is always raw and never probed.
//
// A volume that a worker serves is a character device, the line to the worker's socket,
// and a vhost-user-blk device on a free pcie-root-port. The line is made again by itself
// when the worker is replaced. Mode, limits, growth and counters are the worker's, and
// so is the serial number. The guest's memory must be shared (memory-backend-memfd or
// -file with share=on): asked in Resolve.
//
// A monitor has one client at a time, and connections are short: the operator gives
// the machine a monitor for this daemon. QEMU opens the image itself, so it must be
// able to reach the pool by the daemon's paths.
package qemu

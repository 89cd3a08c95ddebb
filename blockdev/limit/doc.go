// Package limit bounds the rate of a sandbox's reads and writes to a block device
// with the kernel's blk-throttle, by cgroup v2's io.max where the io controller is
// there, by cgroup v1's blkio controller otherwise.
//
// The kernel counts a request against the cgroup that submits it:
//
//   - v2: reads, direct writes, and the write-back of dirty pages all count
//     against the sandbox's cgroup. io.max of that cgroup bounds them together.
//   - v1: reads, direct writes, and the writes of an fsync count against the
//     sandbox's cgroup; background write-back and the filesystem's journal count
//     against the root cgroup, whoever made the pages dirty. So the device has the
//     write limits twice, in the sandbox's cgroup and in the root one: each bounds
//     its part, and a sandbox that writes both ways at once reaches up to both.
//     Rules of v1 do not hold for cgroups below.
//
// A rule belongs to a device number, and the kernel keeps it when a loop device is
// given to another file: whoever sets one lifts it before the device goes.
//
// Sources: Documentation/admin-guide/cgroup-v1/blkio-controller.rst,
// Documentation/admin-guide/cgroup-v2.rst, block/blk-throttle.c.
package limit

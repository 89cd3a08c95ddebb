// Package powercut is a rig that cuts the power under a filesystem, again and
// again, at moments of the test's choice. kill -9 cannot do that: the kernel
// keeps the page cache, so a missing fsync stays unseen.
//
// # How it works
//
// A loop device lies over a file that qemu-storage-daemon exports by FUSE. In
// between, its blklogwrites node records every write, discard and flush in the
// order in which they were done. On the loop device is an ext4, or an XFS with
// reflink, mounted at Rig.Dir: the test works there and notes, with Mark, the
// moment of each acknowledgement. After Stop, Rebuild makes the disk as it was
// at any moment, mounts it elsewhere (which recovers the filesystem's journal),
// and the test looks whether everything acknowledged by then is there.
//
// # Why that is a power cut
//
// A flush is logged after it was done and before it is answered, so an fsync
// that returned lies before the next Mark. What was written since the last flush
// may or may not have reached a real disk: Rebuild with a seed other than 0
// drops an arbitrary subset of it. Writes are kept or dropped whole: a torn
// write is a fault of another kind.
//
// # The log
//
// Its format is that of the kernel's dm-log-writes target
// (Documentation/admin-guide/device-mapper/log-writes.rst, with the structures
// in drivers/md/dm-log-writes.c and QEMU's block/blklogwrites.c): a superblock
// in sector 0, then for each entry one sector that describes it, followed by the
// written bytes, if any. A Moment is a length of this log.
//
// The rig reaches for losetup and mount instead of this project's own packages,
// because those are what it tests. It needs root, loop devices, FUSE and
// qemu-storage-daemon.
package powercut

// Package lvm keeps images as thin volumes of an LVM thin pool that the operator
// has made (lvmthin(7)). It is a blockdev.Backend, Cloner and HealthReporter:
// a clone is a thin snapshot.
//
// What is ours is told by two marks together: a name of our form and the tag of
// this pool. Logical volumes without both are never touched.
//
//	hfi-ID        an image or a draft
//	hft-ID.RAND   removed; its space is being reclaimed
//	hfq-ID.RAND   in quarantine
//	hf-meta-POOL  descriptions: a small ext4 of ours, on a thin volume too, written
//	              full when it is made, so that a pool without space can take away
//	              images and change descriptions
//
// Descriptions lie there and not in tags, because a volume group's metadata
// is one small text that is written anew at each change, and a tag is too short.
// They move with the disks. A draft's name is written there before its volume is
// made, and a description takes the name's place when it is published, which costs no
// command of LVM. So a volume of ours with neither is damaged, and what has no volume is
// left over and removed at Open.
//
// LVM is asked by its JSON reports and told by its commands, each with a filter
// that shows it no devices but those of the volume group. Commands that change the
// group's metadata run one after the other, and the devices' caches are flushed
// after each: LVM does not. How full pool and volumes are is asked of the kernel
// (Documentation/admin-guide/device-mapper/thin-provisioning.rst).
//
// A pool's state is looked at before each change, and errors carry it: a full pool is
// blockdev.ErrNoSpace, one that takes no changes blockdev.ErrNeedsRepair, each with
// what to do (health.go). Extend has the pool get more space by itself (watch.go). A
// command is not ended with its caller: one that is killed may leave devices suspended.
// Everything that changes the world goes through fault (effect.go), where tests
// strike.
//
// Nothing is active that is not open: an opening is an active volume, and one at a
// worker (over NBD or vhost-user) has a note besides (serve/opened), outside of the
// pool. Sizes are
// rounded up to the group's extents.
package lvm

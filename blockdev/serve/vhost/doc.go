// Package vhost serves a volume's bytes to a virtual machine as a disk, by the
// vhost-user protocol: the VMM hands over the guest's memory and an eventfd for
// each direction of each queue, and from then on guest and server talk through
// queues in that memory, without the VMM.
//
//	VMM ── unix socket: messages, descriptors ──► session (one goroutine)
//	guest ── virtqueue, kick ──► loop (one locked thread and io_uring per queue) ──► file
//	                              └──► helpers (goroutines) ──► Device
//
// A Server shows one Device to one VMM after the other. session keeps what the VMM
// has said; a loop runs for each queue that is started and enabled, and nobody else
// touches that queue. A loop never waits but in its ring: it reads and writes a File,
// and what a device.Lender lends it, by the ring, and has helpers do all else.
//
// # Trust
//
// The guest is hostile: descriptors may point anywhere, form circles, and change
// while they are read. Each is copied once, checked, and used from the copy; each
// address is looked up in the memory that the VMM gave. A queue that makes no sense
// stops, and a request out of range fails; both hurt only their guest. The VMM is
// trusted no further than with its own guest: it can cut the memory file and so end
// this process, which therefore serves one volume and nothing else.
//
// # Durability
//
// A flush completes after a sync of the device that began after it was asked for.
// Syncs run one at a time for all queues: a kernel tells of a failed one once, so two
// at once could not both be believed. A write, discard or flush that fails is
// reported to the guest. After one failed flush every later flush and write fails: the kernel
// forgets what it could not write, so a second one would lie. Short reads and
// writes are continued, and fail when nothing moves.
//
// # Order in memory
//
// Guest and loop share indices of 16 bits, for which Go has no atomics: they are plain
// accesses, each of which the processor does as one, kept in order by fence, an atomic
// store that is followed by an atomic load. Go's memory model says nothing about
// memory that another program writes; what holds are the instructions. On amd64 the
// store is an XCHG, a full barrier; the tests and a real guest run there. On arm64 it
// is STLR and the load LDAR, which keep what is before the one before what is behind
// the other, loads behind stores included: that is by the architecture's rules, it
// builds, and it was not run. The ring with the kernel has indices of 32 bits and
// needs a load that acquires and a store that releases, which Go's atomics are.
//
// # Restart
//
// The VMM keeps a piece of memory (the inflight region) in which a loop notes each
// request before it begins, and strikes it out after the guest was told. A server
// that takes over does again what is noted: writes of a disk may be done twice,
// since the guest cannot have been told that the first was done.
package vhost

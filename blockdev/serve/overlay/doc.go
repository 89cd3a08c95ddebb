// Package overlay is a copy-on-write volume without the help of a filesystem: a
// stack of layers over an immutable base.
//
//	top layer     data (a sparse file), map     what was written since the last Seal
//	sealed layer  data, map                     a snapshot: never changes what it reads as
//	base          a Source                      a template's image, here or far away
//
// A layer's data has the volume's own offsets. Its map says for each block of
// 4 KiB whether the layer holds it; a block is read from the highest layer that
// does, and from the base where none does. What the base does not reach reads as
// zero. A layer that holds every block is a plain image: its data file serves the
// volume without this package.
//
// # Order
//
// What the map says may lag behind the data and never leads it. A first write of a
// block goes to the data. Where the data's file is a Witness, Sync makes the data
// durable, and that is all: the file's own extents tell which blocks were written,
// and the map, marked loose, catches up later. Elsewhere, and for blocks that are
// held as holes, Sync then writes the bits of those blocks whose writes had ended
// before, and makes the map durable. Those that come meanwhile share the next one.
// A block that only the data tells of is put into the map before it is discarded.
//
// A process that is killed takes nothing with it: holes are told to the map at once,
// though not flushed, and Recover finds the rest in the data's extents.
//
// So after a crash each block reads as what was flushed last or as something that was
// written later, never as a hole, a stale block of the base over a newer write, or
// what an earlier owner of the space left there. A write of blocks that the top layer
// holds already touches no map, and its flush is one sync of the data.
//
// After a failed sync nothing is acknowledged any more: every write and Sync
// answers blockdev.ErrFailed until the volume is opened again.
//
// # Who fills the holes
//
// Hydrate copies what the base still has to give, Absorb what a sealed layer has
// that nobody needs any more. Both work under the feet of readers and writers and
// can be cut at any time. A Source that is far away verifies each chunk before a
// byte of it is given away, and is asked for ever: a source that fails makes
// readers wait and is told by Status, it never makes a volume fail.
//
// The map's format is in mapfile.go. Nothing here opens files: they are given.
package overlay

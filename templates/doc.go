// Package templates turns uploaded archives into immutable, versioned images
// (revisions), and keeps the cache of sized images ("sources") that volumes are
// cloned from: formatted blanks, and revisions grown to a size. Archives are
// hostile input; images, once READY, never change.
//
// An upload is checked on its way in (package archive) and becomes a tree and a
// store of contents in staging; the tree is written into a fresh ext4 (package
// ext4fill), whose bytes depend on the tree alone; contents that the version before
// has too share its blocks, and a tree that the workspace has already shares the
// whole image. The image is checked, digested and published with a description;
// then it is recorded and acknowledged. So a revision exists when its image does,
// whatever the records say:
//
//	fact                              authority         written
//	a READY revision, its numbers     its description   with the image, in one step
//	a template's head, its CREATED    side log          side log, then store
//	and FAILED revisions, deletions
//	in progress
//	a source                          its description   with the image
//	where a revision's files lie      its image         the manifest, before it; derived
//
// The store has all of it, for a quick start; Open compares, and Rebuild does
// without. A deletion is a mark in both records, then the image goes, then the
// mark; one that is still being read is marked in its description first.
//
// A revision's image is hardly larger than its contents. A source of a revision
// is a clone of it, grown; where that does not do (XFS and btrfs, which only grow
// mounted; ext4 below 16 MiB, which has other blocks; very many tiny files, whose
// share of inode tables would grow along) its tree is written or its files are
// copied into a fresh one.
//
// A revision may stay far away (Register): its image reads from a store, and volumes
// are clones of that image itself. Nothing that needs all of its bytes is made of it.
package templates

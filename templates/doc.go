// Package templates turns uploaded archives into immutable, versioned images
// (revisions), and keeps the cache of sized images ("sources") that volumes are
// cloned from: formatted blanks, and revisions grown to a size. Archives are
// hostile input; images, once READY, never change.
//
// An upload is received into staging and checked on its way (package archive),
// extracted into a fresh ext4 filesystem of ours through a mount that has no
// place in the file system, checked, laid out in few pieces and published with a
// description; then it is recorded and acknowledged. So a revision exists when
// its image does, whatever the records say:
//
//	fact                              authority         written
//	a READY revision, its numbers     its description   with the image, in one step
//	a template's head, its CREATED    side log          side log, then store
//	and FAILED revisions, deletions
//	in progress
//	a source                          its description   with the image
//
// The store has all of it, for a quick start; Open compares, and Rebuild does
// without. A deletion is a mark in both records, then the image goes, then the
// mark; one that is still being read is marked in its description first.
//
// A revision's image is hardly larger than its contents. A source of a revision
// is a clone of it, grown; where that does not do (XFS and btrfs, which only grow
// mounted; ext4 below 16 MiB, which has other blocks; very many tiny files, whose
// share of inode tables would grow along) its files are copied into a fresh one.
package templates

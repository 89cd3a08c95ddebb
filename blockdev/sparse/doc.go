// Package sparse keeps images as sparse files in a pool directory, and makes
// such directories (Prepare).
//
// A pool:
//
//	pool.json                   what this is: format version, UUID, host
//	lock                        held by the one process that uses the pool
//	images/ID/image             the bytes of a flat image
//	images/ID/chain.json        what a layered image consists of; checksummed
//	images/ID/layer-X.data      a layer's bytes, at the image's own offsets, and
//	images/ID/layer-X.map       which of its blocks count: see serve/overlay
//	images/ID/base-X            a file that nobody writes, below all layers; or
//	images/ID/chunks-X          what a base that is far away consists of: digests
//	images/ID/trace.json        what those that have this image as their base want of
//	                            it first; may be missing
//	images/ID/description.json  says what the image is; checksummed
//	images/ID/lock              held while the image is open: by this process, or by
//	                            the worker that serves it; what it says is of its opening
//	drafts/ID/                  images that are being made; same files
//	trash/                      removed images whose space is being reclaimed
//	quarantine/NAME/            found, but explained by nothing: content, reason
//	addresses/ID.json           where a base far away is by now that was made for image ID
//	staging/                    for the pool's users; never looked into
//
// # Layered images
//
// chain.json is an envelope of "ID/chain.json" around JSON: version (1), layers (their
// names, the top first), base (its name, absent for none), baseSize (bytes), origin
// (ID of the image that the base was, absent for an own one). As long as it is there it decides what the image reads as, and what else lies in the
// directory (an image, a part that it does not name) is what a crash left, and goes.
// A name is layer-, base- or chunks- and 16 random hex digits, so no two parts have the same
// one; all lie in the image's own directory. What several images read from are hard
// links of one file, which nobody writes: only a file of one name is written, the top or
// what it is brought down into. A removal unlinks, and the last one frees.
//
// A seal (Snapshot, or Clone of a layered volume) puts an empty layer on top. Its files
// and their names are durable before chain.json names it, and it is named before anything
// is written to it: until a worker has gone on to it, it writes to the layer below, and
// whoever finds both finds all. A flat image's file gets its second name as a base,
// durably, then chain.json names it, then the first name goes. Flatten brings blocks up
// into the top, or those of a smaller top down into what lies under it if that is nobody
// else's, until one file holds all, gives it the name image, durably, and only then takes
// chain.json away. Each
// may be cut anywhere. A chain that names a file that is not there, or is too short, is
// damage: the image is quarantined, and never reads as something else.
//
// # Bases that are far away
//
// CreateRemote makes an image whose base is a store's: version 2 of chain.json, whose base
// names a file of chunks (overlay.WriteChunks) and which has url (of the bytes, with what
// it has of secrets: only this user reads the file) and digest (SHA-256 of the file of
// chunks). That file is flushed before the chain names it, is verified whole before any
// byte of the base is taken, and shared by hard link like a base on this host. One that is
// missing, short, or another one is damage: the image is quarantined. Who has the base
// in the daemon waits for the store until its context ends.
//
// A base that has moved has an envelope of "addresses/ID.json" around JSON: url, and digest
// as in the chains it counts for, which are those whose addressOf, or else origin, is ID.
// It is durable before anybody asks there, and counts before what the chain says; one that
// cannot be read counts for nothing. One that no chain follows goes when the pool is opened.
//
// A clone of such an image shares the chunks and not the top, as long as that has
// nothing; one whose top has something (it is on its way to be flat) is sealed like a
// volume, so that it can go on.
//
// # What is durable, and why in that order
//
// Publish writes the description into the draft, flushes the image's bytes, the
// description and the draft's directory, and only then renames the directory
// into images/ and flushes that. A rename is atomic but says nothing about the
// bytes below it: renamed first, a power cut could leave a published name over
// an image of zeroes. Flushing images/ last makes the name durable, and with it
// all that it leads to; an image without a good description therefore never
// comes from a crash, and is quarantined as damage.
//
// Describe writes beside the old description, flushes, renames over it and
// flushes the directory: at each moment one whole description is in place.
//
// Remove renames into trash/ and flushes images/: the name is gone durably
// before its space is touched. Should the rename itself not have reached the
// disk, nothing was acknowledged and the image is whole.
//
// A failed flush is never tried again: the kernel may have dropped the data and
// would then answer success. It is blockdev.ErrFailed, the draft in question is
// thrown away, and the process must stop acknowledging.
package sparse

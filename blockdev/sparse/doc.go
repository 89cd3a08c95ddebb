// Package sparse keeps images as sparse files in a pool directory, and makes
// such directories (Prepare).
//
// A pool:
//
//	pool.json                   what this is: format version, UUID, host
//	lock                        held by the one process that uses the pool
//	images/ID/image             the bytes
//	images/ID/description.json  says what the image is; checksummed
//	images/ID/lock              held while the image is open by this process
//	drafts/ID/                  images that are being made; same files
//	trash/                      removed images whose space is being reclaimed
//	quarantine/NAME/            found, but explained by nothing: content, reason
//	staging/                    for the pool's users; never looked into
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

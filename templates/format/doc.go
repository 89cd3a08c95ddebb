// Package format turns an upload of any format that is taken into one plain tar
// stream, which package archive then checks like a tar that was sent plainly.
// Nothing here looks at what the entries mean; what a decoder is made to do is
// bounded here: in bytes, in memory, and in time by the context.
//
// A format is known by content. A plain tar comes first: a header whose checksum
// is right, or "ustar" in its place, or a block of zeroes (an empty archive). No
// client of the contract sends anything else, and none of its archives can be
// taken for a compressed one. Then gzip, zstd and zip by their magic; whatever
// remains is read as a tar, whose reader says what is wrong with it.
//
// gzip (RFC 1952) and zstd (RFC 8878) are streamed, with all their members or
// frames; anything behind the last one is refused, but for the zeroes with which
// some writers fill up the last block of a pipe. A zip is kept in an unnamed
// file in staging until it is complete, because its directory is at its end:
// it is believed only where directory and local headers say the same, no two
// entries share a byte, and no name comes twice. Names are taken as the bytes that
// the headers have.
//
// Bombs: what comes out is at most Limits.Bytes, and at most Limits.Free plus
// Limits.Ratio for each byte that went in. The first of these that is passed ends
// the reading, at that byte; for a zip before anything is unpacked.
package format

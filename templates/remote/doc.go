// Package remote knows template revisions whose bytes are far away: in an object
// store, or behind any HTTP server that answers range requests.
//
// A published revision is three files in one place, which any tool can upload:
//
//	NAME-VERSION.image   the bytes of a sized image; sparse where it was written
//	NAME-VERSION.chunks  what they are, chunk by chunk (overlay.WriteChunks)
//	NAME-VERSION.json    the manifest: names the two, and has the digest of the second
//
// The SHA-256 of the manifest therefore stands for all of it: whoever registers a
// revision says where the manifest is and which one it has to be, and what a store
// sends otherwise is never believed.
//
// Where a server may fetch from is its operator's word (Stores). A URL has no user,
// query or fragment: those are secrets or expire, and a volume that is made today may
// want a block next month.
package remote

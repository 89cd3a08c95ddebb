// Package tarball makes a plain tar of a directory whose exact length is known
// before its first byte is read, so that it can be sent with a Content-Length
// and without a temporary file. Symbolic links, hard links, modes, numeric
// owners, times in nanoseconds, extended attributes, empty directories and odd
// names are kept.
//
// The same directory can be had as a tree with the digests of its contents, for
// sending only parts of it. Extract goes the other way: it unpacks a tar, wherever
// it is from, into a directory and nowhere else.
package tarball

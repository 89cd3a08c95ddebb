// Package tarball makes a plain tar of a directory whose exact length is known
// before its first byte is read, so that it can be sent with a Content-Length
// and without a temporary file. Symbolic links, hard links, modes, numeric
// owners, times in nanoseconds, extended attributes, empty directories and odd
// names are kept.
package tarball

// Package lvmguesttest holds the test of the daemon with an LVM thin pool. It runs in
// a guest, daemon and all: hosts of tests have no device mapper. It has no code but
// the test.
package lvmguesttest

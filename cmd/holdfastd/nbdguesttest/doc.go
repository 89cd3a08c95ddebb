// Package nbdguesttest holds the test of volumes that are mounted by the kernel's NBD
// client, over a worker. It runs in a guest, daemon and all: hosts of tests have no such
// client. It has no code but the test.
package nbdguesttest

// Package guesttest holds the tests of attaching to QEMU that need a guest. It has
// no code but them.
package guesttest

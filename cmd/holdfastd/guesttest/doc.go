// Package guesttest holds the tests of the daemon that need a guest. It has no code
// but them.
package guesttest

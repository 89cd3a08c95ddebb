// Package guesttest holds the tests of the benches and the demo that need a guest. It
// has no code but them.
package guesttest

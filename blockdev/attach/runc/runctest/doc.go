// Package runctest starts real runc containers for tests: a busybox root
// filesystem, a state directory of its own, and nothing left behind.
package runctest

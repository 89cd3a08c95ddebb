// Package daemontest gives a test a real holdfastd, built from this tree, on a
// state directory of its own that the test's end takes away again.
package daemontest

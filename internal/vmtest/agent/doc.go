// Package agent is how a test talks to the inside of its guest: commands go in
// over a virtio serial port, and their output and exit codes come out. It is used
// on both sides.
package agent

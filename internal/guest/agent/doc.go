// Package agent is how a guest is talked to inside: commands go in
// over a virtio serial port, and their output and exit codes come out. It is used
// on both sides.
package agent

// Package guest is how the daemon asks an agent inside a virtual machine
// (cmd/holdfast-guest) to work on a volume's filesystem, where this host must not:
// to mount and unmount it, to grow it after its device, to trim, freeze and thaw
// it. Both sides use it.
//
// Messages are lines of JSON over a byte stream: a virtio-serial port named Port,
// which the guest opens, or vsock port VsockPort, where the guest listens. A
// request has a number that its answer repeats, and a stream has no beginning:
// what is left of an earlier connection is passed over on both sides. While a
// request takes its time the agent says so every WorkingEvery, so that one that
// works is told from one that is not there.
//
// To the host every answer is a stranger's word. Lines, bytes, the time between two
// lines and the whole are bounded, numbers are checked against each other and the
// device, words are shown in quotes and cut short, and nothing that a guest says
// becomes a path, an argument or a decision about another volume.
package guest

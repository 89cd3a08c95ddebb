// Package vmtest gives tests a guest with what this host's kernel lacks: device
// mapper, loadable modules, an ext4 that may be grown while mounted, a machine
// that can be unplugged. It is QEMU with emulated processors (-accel tcg), the
// distribution's cloud kernel and a root filesystem made from the programs of this
// host.
//
// There are two ways to use it. Main runs a package's tests inside a guest, each
// as it is: what `go test` prints, its exit code and its coverage come back. Start
// gives a guest from outside, as a sandbox: with a monitor (QMP) to plug volumes
// into, and a shell in it.
//
// A guest is started from a saved state, which takes a fraction of a second; the
// state is made once for an image by booting it. Images and states are kept in
// .cache/vm, named by the digest of all that they are made of.
package vmtest

// Package guest starts machines of our own that have what this host's kernel
// lacks: device mapper, loadable modules, an ext4 that may be grown while mounted,
// slots that disks can be plugged into. A guest is QEMU with emulated processors
// (-accel tcg), the distribution's cloud kernel and a root filesystem made from the
// programs of this host. Tests use it by internal/vmtest; the demo and the bench use
// it as it is, as a sandbox to attach volumes to.
//
// Open gives a guest, with a monitor (QMP) for whoever plugs volumes into it, and a
// shell in it. It is started from a saved state, which takes a fraction of a second;
// the state is made once for an image by booting it. Images and states are kept in
// .cache/vm of the project, named by the digest of all that they are made of.
//
// Everything has a deadline, and every failure tells the end of the console. A guest
// ends with the process that started it.
package guest

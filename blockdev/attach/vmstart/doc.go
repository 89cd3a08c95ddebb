// Package vmstart gives volumes to virtual machines that do not run yet: target
// {type: "vm", vmm: "qemu", "firecracker", "cloud-hypervisor" or "kata"}. The
// attachment comes first, with its epoch, its taint and the lock beside the image;
// then Launch tells what to start the machine with.
//
// Each attachment has a path of its own to the image, a symbolic link below
// Options.Dir with a name that cannot be guessed. It goes when the volume is being
// detached: a machine that is started with the arguments of an attachment that has
// ended finds nothing, wherever the volume is by then.
//
// Who has the volume is asked of the kernel: the process that has the image open. As
// long as none has, the volume is attached and not started, and detaching it is free;
// an attachment that was never used stays until it is detached. Once a process was
// found it is remembered by pid, start time and boot, its end is told by a pidfd and
// ends the attachment, and Fence kills it and nothing else.
//
// A target that wants it gets the socket of the volume's worker, of which the same
// holds: who is connected to it has the volume.
//
// A volume has left when its link is gone and, after that, nobody has the image open:
// for a file the kernel proves it (a lease, which counts every opening), for a device
// the pool does when it closes it; processes are asked so that the answer names them.
package vmstart

// Package cage runs filesystem tools on bytes that a tenant may have shaped. A
// cage is a container (runc) in which there is one image, the tools, and nothing
// else: a user namespace whose root is nobody on this host, no capability, no new
// privileges, no network, a read-only root with the programs and libraries of
// /usr, no /proc and no /sys, a seccomp filter that lists what is allowed, and
// bounds on memory, processes and time. A tool that is taken over by an image can
// spoil that image and waste its own time.
//
// A cage serves one job, on one image, and is destroyed: what a tool left in it is
// seen by no other. Since making one takes longer than most jobs, a few wait ready,
// each with a process of ours inside (Inside) that reads the commands from a
// socket. The image comes in last, as a mount that is put into the cage's mount
// namespace: an image file through an owner-mapped bind mount, a block device as a
// node of its own, which its device control group names.
//
// Nothing is kept: what a crash leaves (below Options.Dir, in control groups) is
// found and removed by the next Open. The processes end by themselves, since their
// socket has no other end any more.
//
// The tree of a template is not copied in a cage but by code of ours (package
// filecopy): a user namespace may set neither trusted.* attributes nor owners that
// it does not map.
package cage

// Package attach makes a volume visible in a sandbox, and takes it away again.
//
// A container or a host path needs a mounted filesystem: the Stage mounts the
// volume's block device once on this host, in a directory of ours that no tenant
// can reach, and Attachers clone that mount into sandboxes by file descriptor
// (open_tree, move_mount), never by a path that a tenant can race. Later
// Attachers (VMs) take the endpoint itself and need no stage.
//
// Nothing is remembered here: the kernel is asked (mountinfo, /sys/fs, /proc).
package attach

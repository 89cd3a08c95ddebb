// Package sandbox is a small runtime for sandboxes on one machine: containers
// made with runc, each with a root filesystem of its own, its volumes attached
// before its first process starts, and no network. It is a client of the engine
// like any other, and not part of it.
//
// What is where:
//
//	STATE/sandboxes/images/   root filesystems that were made here; read-only in use
//	RUN/runc/                 runc's state
//	RUN/boxes/ID/             a sandbox's bundle and the mounts of its making
//
// RUN is in memory and goes with a boot, as the containers do; it is named by the
// host's id, so everything in it is ours and what no record names is removed.
//
// A sandbox is a record in the metadata and a container. The record is written
// first: "deploying" before anything is made, "deleting" before anything is
// taken away. The container is not asked to be there: when its first process has
// ended the sandbox has failed, and its volumes are free. Containers outlive the
// daemon; the processes that the daemon watched in them live on, but nobody
// collects their output any more.
//
// Files are read and written by a program inside the container (busybox, mounted
// read-only), with the rights of the container: the daemon opens nothing in it.
package sandbox

// Package worker is the inside of the process that serves one volume:
// cmd/holdfast-blockd is only its main. The daemon's side is serve/control.
//
//	birth.go     the first call: what to serve, and all descriptors for it
//	confine.go   what the process gives up before a client is heard
//	volume.go    the device: a flat image or layers, and the front that shows it
//	calls.go     the control socket: one call a connection
//	change.go    changes of the stack, and the record that the daemon makes of them
//	hydrate.go   the copy of the base in the background
//
// # Trust
//
// A client is hostile, and a virtual machine's VMM no better (see vhost and nbd). What
// one makes of this process is worth little: it has one volume, opens nothing, runs
// nothing, knows no other process and no network (see confine). The daemon is trusted:
// it is recognised by the user that started this process.
//
// # Durability
//
// Stop ends with a sync. A sync that failed once is told by every Status and by Stop,
// and nothing is acknowledged after it.
package worker

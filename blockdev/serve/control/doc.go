// Package control is the daemon's side of workers: it starts the process that serves
// a volume over vhost-user or NBD, finds it again after the daemon was restarted,
// and talks to it. The words are in control/wire, the other side is serve/worker.
//
// # Who owns what
//
// A worker has a directory below the Starter's:
//
//	DIR/ID/control.sock   where the daemon talks to it
//	DIR/ID/data-X.sock    where virtual machines or NBD clients do
//	DIR/ID/root           a directory with nothing in it: the worker's root
//
// The daemon makes all of it, opens all files and hands them over, so the worker
// opens nothing. That a worker runs is never stored: who can be connected to at its
// control socket runs, and the kernel tells which process that is.
//
// A worker ends when it is told to, and not with the daemon: it has a session, a
// control group and a user of its own. What a dead one has left is taken away by the
// next Serve or by Stop.
//
// # Concurrency
//
// All methods may be called from any goroutine. Calls of Serve and Stop for one ID
// are serialised by the caller, as it does for a Backend's.
package control

// Command holdfast-blockd serves one volume over vhost-user or NBD. The daemon starts
// it, and it lives on when the daemon ends; see blockdev/serve/control, and
// docs/workers.md for who operates a host.
//
// It is of no use by hand: descriptor 3 is a socket over which it is told what to
// serve and is handed all files, and it ends when nobody tells it anything. SIGTERM
// makes it finish what has begun, flush and end.
package main

// Package frontend is the VMM's and the guest's side of vhost-user-blk without
// either: it shares memory with a server, puts requests into its queues and takes
// the answers. It loads our server and others alike, and connects again, with the
// requests that were in flight, when a server has gone.
//
// A Frontend and its Queues are for one goroutine each, but for Abandon.
package frontend

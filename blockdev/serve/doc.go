// Package serve says what can be asked of a volume that a worker serves: how it
// does, and to go slower. The rooms below it are what a worker is made of:
//
//	control   starts workers, finds them again and talks to them: the daemon's side; control/wire has the words
//	worker    the worker's side: what cmd/holdfast-blockd runs
//	vhost     vhost-user-blk, for virtual machines
//	nbd       the NBD protocol, for anybody
//	overlay   layers over a base: copy-on-write, snapshots, hydration
//	uring     the entries of an io_uring that the loops fill
//	meter     counts; throttle bounds
//	device    a plain file as something to serve, and what else servers use directly
package serve

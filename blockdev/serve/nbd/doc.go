// Package nbd serves volumes over the NBD protocol (fixed newstyle), on unix
// sockets and, encrypted, on TCP.
//
// A Server holds Exports by name; an Export is a Device (File is one) with a size
// and what all of its connections share: the flusher, the rate limit, the meter.
// ServeConn takes one connection through its two phases:
//
//	handshake.go, option.go   options until the client says GO; a deadline bounds it
//	request.go                a request is decoded and checked: the one place for that
//	loop*.go                  transmission by one io_uring: sockets, on a File or a device.Lender
//	loop_tls.go               the same over TLS, which reads and writes memory for it
//	stream.go                 transmission by goroutines: every other Device, and hosts without io_uring
//	swap.go                   another device in the place of the one that is served
//	perform.go                what a request does to the device
//
// Promises:
//
//   - A flush is answered after fdatasync of all writes that were answered before
//     it on any connection, which is why clients may use several (CAN_MULTI_CONN).
//     Once a sync failed, no write and no flush of that export succeeds again.
//   - A read or write that the device did in part is an error, never success.
//   - What a client sends wrong costs that client an error or its connection, and
//     nobody else anything: buffers and requests in flight are bounded for each
//     connection, connections for the server, and who does not read its replies
//     stops being read from.
//
// The size of an export is what it was when the connection was made: a grown volume
// is seen by the next connection. Not offered: extended headers, CACHE, RESIZE.
//
// Source of all numbers: the protocol's description, doc/proto.md of
// github.com/NetworkBlockDevice/nbd.
package nbd

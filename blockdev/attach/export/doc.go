// Package export gives volumes to anybody on this host who may connect to a socket:
// target {type: "export", protocol: "nbd" or "vhost-user"}. The pool's worker serves the
// socket; this package lets others in, tells whether somebody is connected, and ends it.
//
// # Who may connect
//
// The worker's socket is root's alone. A target's owner, the number of a user of this
// host, may connect as well: the socket is made that user's. A target's socket, below one
// of the directories that the operator allows, is a symbolic link that this package makes
// there: a name that stays when the worker is replaced, and that whoever prepares a
// virtual machine can choose. It opens no door that the owner does not open.
//
// # Over the network
//
// With transport "tls" a volume is reached at a port of the host instead: NBD over TLS.
// The worker has the listening socket and the certificates, so that connections outlive
// the daemon, and opened neither. Who connects needs a certificate of the operator's
// authority (of one of the target's clients, if it names any) and the export's name,
// which is random. Port and name are the attachment's for good. Certificates that the
// operator has replaced are handed to the workers at the next Probe and Attach.
//
// # Its end
//
// A detach is refused while a client is connected, and nothing has changed: clients hang
// up first. One that has just done so is waited for, two seconds at most. By force the
// worker is killed, which is the proof that nobody writes any more: nothing else has the
// volume open. A client that comes again at once may find the worker's successor and be
// in the way once more; it is told apart by nothing.
//
// Several readers may be given one volume by NBD. They share the worker, so
// one that is detached keeps its connection until the last one is; it cannot write.
package export

// Package wire is what a daemon and the worker of a volume say to each other: JSON
// in messages that keep their bounds (SOCK_SEQPACKET), with descriptors beside them
// (SCM_RIGHTS). docs/workers.md describes it for people.
//
// One connection carries one call: a Request, then a Reply. Seal, Absorb and Settle
// turn around once in between: the worker sends a Reply whose Record asks the daemon
// to make the new stack of layers durable, and the daemon answers by a Request whose
// Op is Recorded.
//
// The first call of all is Open. It comes over the socket that a worker is born
// with; all others over connections that the worker accepts from the user that
// started it.
//
// A message is at most MaxMessage bytes with at most MaxFiles descriptors; one that
// is longer, is no JSON, has another version or other descriptors than it says is
// ErrProtocol, and costs the connection. Its descriptors are closed.
package wire

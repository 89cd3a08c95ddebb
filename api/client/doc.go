// Package client is a Go client of Holdfast's HTTP API, over TCP with a key or
// over the daemon's unix socket, whose users are administrators.
//
// Methods are named after what they do to the resource; every error of the
// server is an *Error. A Client is safe for concurrent use. Nothing is retried:
// creates are idempotent only with an Idempotency-Key, and the caller knows best.
package client

// Package guesttest tries the vhost-user server with a real guest: QEMU plugs in a
// disk that is served here, and the guest's kernel uses it.
package guesttest

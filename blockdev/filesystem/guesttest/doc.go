// Package guesttest has the tests of package filesystem that this host's kernel may
// not allow: growing an ext4 that is mounted needs CAP_SYS_RESOURCE, which
// containers and some hosts do not have. They run in a guest.
package guesttest

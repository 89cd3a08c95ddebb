// Package guesttest tries package nbd with the kernel's own client, which few hosts
// have: server and client both run in a guest.
package guesttest

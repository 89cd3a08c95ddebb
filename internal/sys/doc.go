// Package sys is the kernel boundary: the only importer of golang.org/x/sys/unix.
// One file per topic; errors name the call and wrap its errno, so that callers
// match them with errors.Is.
package sys

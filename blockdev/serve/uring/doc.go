// Package uring fills the entries of an io_uring: one function for each operation
// that a worker's event loop needs. The ring itself is sys.Uring.
//
// An event loop is a goroutine that is locked to its thread and is the only one to
// touch its ring. It fills entries, submits them and waits in one Enter, and takes
// all completions before the next. Nothing here allocates.
//
// Memory that an entry names belongs to the kernel until the completion is there;
// the caller keeps it reachable. Go's collector moves nothing on the heap, which is
// why a slice of it can be named.
package uring

// Package audit keeps the audit log: one line of JSON for each mutation that
// was asked for, with who asked and how it ended. It is the API server's Auditor.
//
// The log is a file of mode 0600 that is appended to and never changed. When it
// has reached its size it becomes FILE.1, that one FILE.2 and so on, and the
// oldest goes. An entry is handed to the kernel before the request is answered,
// so it outlives the daemon, but it is not synced: a power cut can take the last
// seconds. They are synced when the file is rotated or closed.
//
// The newest entries are kept in memory to be asked for, each workspace's apart,
// so that a busy one does not push out the others'.
package audit

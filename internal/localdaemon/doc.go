// Package localdaemon runs a holdfastd of one's own beside the caller, for as
// long as a demonstration or a measurement takes, and takes it away again.
package localdaemon

// Package run executes external programs: the only importer of os/exec for
// commands that come and go. Every call has a context and a timeout, no
// shell, LC_ALL=C, bounded output and a typed error, so that each tool's
// output is read in exactly one place (its caller's classify function) and
// in one language.
//
// A tenant's string is never an argument: callers pass ids, numbers and
// paths that they made themselves.
package run

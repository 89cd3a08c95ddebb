// Package push sends a directory to a server that may have parts of it: it puts
// the directory (internal/tarball), what travels (templates/delta) and the client
// together, for the command line and the bench.
package push

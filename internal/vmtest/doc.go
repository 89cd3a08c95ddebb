// Package vmtest gives tests the guests of internal/guest, with what this host's
// kernel lacks.
//
// There are two ways to use it. Main runs a package's tests inside a guest, each
// as it is: what `go test` prints, its exit code and its coverage come back. Start
// gives a guest from outside, as a sandbox: with a monitor (QMP) to plug volumes
// into, and a shell in it.
package vmtest

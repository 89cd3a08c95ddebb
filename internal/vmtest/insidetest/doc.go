// Package insidetest is run by the tests of vmtest, in a guest, to see that what `go
// test` says there comes back. It has no code but its tests.
package insidetest

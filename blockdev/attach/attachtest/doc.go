// Package attachtest makes volumes for the tests of attachers: a filesystem on a
// loop device, and a stage to mount it on.
package attachtest

// Package bench measures what Holdfast claims, beside what a user would do
// instead, in the same run: each round takes one sample of ours and one of the
// yardstick, so that a busy machine slows both and the ratio stays.
//
// It drives a real daemon over its API, as a process of its own.
package bench

// Package opened is what backends have in common that have workers serve their images:
// the note that says so beside an image or in the run directory, and the calls that go
// to the worker of an open image.
//
// A note is written before there is a worker, so that one that runs is always found,
// and taken away after it has ended. It lasts as long as the host's boot, whether the
// worker does or not: an opening ends with Close, not with a process. It is never
// flushed, because after a power cut there is no client either.
package opened

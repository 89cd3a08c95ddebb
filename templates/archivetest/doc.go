// Package archivetest makes archives for tests: right ones, and Hostile, the
// collection of everything that must be refused, as code that makes it.
package archivetest

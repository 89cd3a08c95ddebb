// Package blockdevtest is for the tests of packages that deal with block images:
// what a test requires of its machine (Require), places to work in (ReflinkDir),
// proof that nothing is left behind (LeakCheck), the contract that every
// blockdev.Backend passes (TestBackend), and a backend in memory that can fail
// or crash at every side effect (Memory).
package blockdevtest

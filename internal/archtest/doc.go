// Package archtest holds the architecture of the project as tests, each rule
// with its reason: which package may import which, that every package says
// what it is for, what may stand at the top of the tree, and that every
// dependency is explained in docs/dependencies.md.
//
// The linter has the import rules as well, where they are seen while code is
// written; here they hold without it. It has no code but its tests.
package archtest

// Package engine decides. It owns the life of volumes and their attachments, the
// admission ledger, the per-volume locks and the reconcile loop. It knows no
// system call, no command and no path: mechanisms are the interfaces in world.go.
//
// A volume's record says what is wanted and which step comes next; step (a pure
// function, step.go) reads it and names that step; take performs it. Every step
// is "make it so": run twice it is done once, and a crash between any two steps
// is repaired by running it again. Records may lag the world, never lead it.
package engine

// Package vmmtest is Firecracker and Cloud Hypervisor as their attachers see them:
// servers of their protocols, with the state machines behind them, each in a
// process of its own that really opens the images. No guest runs in them: a test
// says when it answers.
//
// Every request is held against the API document that the project of the VMM
// publishes (testdata), and so is every answer. Faults are given on demand: refusals,
// silence, half answers, answers that get lost after the work was done.
//
// A package that uses it calls Main first in its TestMain.
package vmmtest

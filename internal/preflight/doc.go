// Package preflight says what this host has of what Holdfast needs, what
// follows from each thing that is missing, and what to do about it. It changes
// nothing but a probe file that it removes.
package preflight

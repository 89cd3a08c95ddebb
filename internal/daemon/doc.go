// Package daemon is holdfastd's inside: configuration, the lock on the state
// directory, the wiring of stores, pool, engine and API server, the order of
// start and stop, and rebuild. Only cmd imports it; it is the one place that
// sees concrete backends and attachers.
package daemon

// Package throttle bounds the rate of the requests that a volume's worker serves:
// requests and bytes per second, reads and writes apart, with a burst.
//
// A Limiter does not sleep: Take says how long its caller has to wait before it
// serves a request, so that an event loop can arm a timer and a goroutine can
// sleep. It is shared by all queues and connections of one volume; Take takes no
// lock, allocates nothing, and is one load when nothing is bounded.
package throttle

// Package meter counts what a volume's worker serves: requests, bytes, errors and
// latencies by kind, how many are inside, and what they wait for.
//
// A Meter is a volume's; each event loop or connection counts into a Queue of its
// own, so that no two processors write one cache line, and no call on the hot path
// allocates or locks. A Snapshot is their sum, with all that closed queues counted.
//
// Times are nanoseconds of Now.
package meter

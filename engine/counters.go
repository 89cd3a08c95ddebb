package engine

import "maps"

// The names of Counters.
const (
	countForced   = "forced"   // detaches by force that were asked for
	countShutdown = "shutdown" // filesystems shut down by force
	countSevered  = "severed"  // images cut off from a device that was still held
	countKilled   = "killed"   // sandboxes ended by force
	countLost     = "lost"     // sandboxes that ended with a volume attached
	countHung     = "hung"     // steps that did not end in their time
)

var counters = []string{countForced, countShutdown, countSevered, countKilled, countLost, countHung}

func (e *Engine) count(what string) {
	e.mu.Lock()
	e.counts[what]++
	e.mu.Unlock()
}

// Counters tells how often something happened since the start of the process:
// "forced", "shutdown", "severed", "killed", "lost" and "hung".
func (e *Engine) Counters() map[string]uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := maps.Clone(e.counts)
	for _, name := range counters {
		all[name] += 0
	}
	return all
}

// Hanging is the number of volumes that wait for a step that hangs.
func (e *Engine) Hanging() int { return e.locks.allHung() }

// AttachmentsByPhase counts the attachments of all volumes.
func (e *Engine) AttachmentsByPhase() map[AttachmentPhase]int {
	counts := map[AttachmentPhase]int{Attaching: 0, Attached: 0, Detaching: 0}
	e.catalog.each(func(v Volume) {
		for _, a := range v.Attachments {
			counts[a.Phase]++
		}
	})
	return counts
}

package worker

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// giveBack returns to the host what is not needed of the worker's memory, its program
// among it, much of which has begun or fetched and is of no use now. Pools keep things
// for one collection.
func (w *volume) giveBack() {
	w.giving.Lock()
	defer w.giving.Unlock()
	runtime.GC()
	debug.FreeOSMemory()
	for tries := 0; heap(heapFree) > mostFree && tries < freeTries; tries++ {
		stir()
		debug.FreeOSMemory()
	}
	_ = w.program.Unload() // then it takes more than it has to
}

const (
	mostFree  = 512 << 10 // bytes
	freeTries = 3
	// stirSize is more than a processor allocates from pages of its own.
	stirSize = 128 << 10
	// mostStirred bounds what a worker takes for that which was busy.
	mostStirred = 64 << 20

	heapFree     = "/memory/classes/heap/free:bytes" // and in memory
	heapReleased = "/memory/classes/heap/released:bytes"
)

// stir uses what is free of the heap, from its beginning. Go's scavenger in the background takes a part of
// the heap for done with when nothing is left of it below where it has got to, whatever is
// left above (runtime/mgcscavenge.go, scavengeOne), and then nobody gives that back until
// something of the part has been free anew: MiB that an idle worker would keep.
func stir() {
	var all [][]byte
	for most := min(heap(heapFree)+heap(heapReleased), mostStirred); most >= stirSize; most -= stirSize {
		all = append(all, make([]byte, stirSize))
	}
	runtime.KeepAlive(all)
}

func heap(class string) uint64 {
	s := []metrics.Sample{{Name: class}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

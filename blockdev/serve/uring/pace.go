package uring

import (
	"runtime"
	"sync/atomic"

	"holdfast/internal/sys"
)

// keepers counts the loops of this process that may keep their processors.
var keepers atomic.Int32

// TakeKeep gives a loop leave to keep its processor while it waits for a disk (see
// sys.Uring.KeepProcessor), until GiveKeep. At most half of Go's processors are kept: all
// other goroutines have the rest. A loop without leave waits as anybody does.
func TakeKeep() bool {
	most := int32(runtime.GOMAXPROCS(0) / 2)
	for n := keepers.Load(); n < most; n = keepers.Load() {
		if keepers.CompareAndSwap(n, n+1) {
			return true
		}
	}
	return false
}

// GiveKeep gives up what TakeKeep gave.
func GiveKeep() { keepers.Add(-1) }

// The fewest and the most entries that are submitted ahead.
const (
	aheadFewest = 2
	aheadMost   = 8
)

// SubmitAhead is called between two requests of a batch by a loop that has more of it to
// fill entries for, and so many in flight. It submits what there is once that is worth a
// call: the disk has something to do while the loop goes on. Submitting all of a batch at
// its end rings the disk's bell least often, and was slower by a fifth.
func SubmitAhead(r *sys.Uring, inflight int) {
	if r.Filled() >= min(max(inflight/4, aheadFewest), aheadMost) {
		_ = r.Submit() // what is wrong with the ring the next Enter tells
	}
}

package vhost

import (
	"slices"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/throttle"
)

// TestDelayKeepsOrder: requests are due in the order in which they came, whatever
// their size and under whichever limits, and those of one way do not hold back those
// of the other.
func TestDelayKeepsOrder(t *testing.T) {
	limiter := &throttle.Limiter{}
	l := &loop{server: &Server{o: Options{Limiter: limiter}}, meter: (&meter.Meter{}).NewQueue()}
	limiter.Set(blockdev.Limits{ReadBytes: 4096, WriteIOPS: 1}, time.Nanosecond)
	requests := make([]request, 9)
	came := [2][]*request{}
	for n := range requests {
		r := &requests[n]
		r.kind, r.length, r.began = []uint32{kindIn, kindOut, kindWriteZeroes}[n%3], int64(4096*(9-n)), meter.Now()
		if l.delay(r) {
			way := min(n%3, 1)
			came[way] = append(came[way], r)
		}
	}
	if l.delay(&request{kind: kindFlush}) {
		t.Error("a flush is held back")
	}
	check := func(what string) {
		t.Helper()
		for way, want := range came {
			var got []*request
			due := int64(0)
			for r := l.delayed[way].first; r != nil; r = r.next {
				if r.due < due {
					t.Errorf("%s: one is due before the one that came before it", what)
				}
				got, due = append(got, r), r.due
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: %d wait in another order than %d came", what, len(got), len(want))
			}
		}
	}
	if len(came[reads]) != 2 || len(came[writes]) != 5 {
		t.Errorf("%d reads and %d writes are held back, but for the first of each", len(came[reads]), len(came[writes]))
	}
	check("at first")
	limiter.Set(blockdev.Limits{ReadIOPS: 1, WriteIOPS: 2}, time.Nanosecond)
	l.relimit()
	check("under other limits")
	if due, ok := l.nextDue(); !ok || due != min(l.delayed[reads].first.due, l.delayed[writes].first.due) {
		t.Errorf("the next is due at %d", due)
	}
	limiter.Set(blockdev.Limits{}, 0)
	last := &request{kind: kindIn, began: meter.Now()}
	if !l.delay(last) {
		t.Error("a read overtakes those that wait")
	}
	came[reads] = append(came[reads], last)
	check("without limits")
}

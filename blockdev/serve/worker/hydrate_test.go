package worker

import (
	"testing"
	"testing/synctest"
	"time"

	"holdfast/blockdev/serve/control/wire"
	"holdfast/blockdev/serve/meter"
)

// TestPace: while clients do something, or have just done, hydration keeps to its rate;
// when they have been quiet for a second it takes all there is, until they come back.
func TestPace(t *testing.T) {
	const rate, each = 8 << 20, 1 << 20
	synctest.Test(t, func(t *testing.T) {
		h := newHydration(&volume{words: wire.Volume{HydrateRate: rate}, meter: &meter.Meter{}})
		took := func(ranges int) time.Duration {
			begun := time.Now()
			for range ranges {
				if err := h.pace(t.Context(), each); err != nil {
					t.Fatal(err)
				}
			}
			return time.Since(begun)
		}
		q := h.w.meter.NewQueue()
		request := func() { q.Begin(); q.End(meter.Read, meter.Now(), 4096, false) }
		if d := took(1000); d != 0 {
			t.Errorf("nobody has come yet: %v", d)
		}
		q.Begin() // it waits, as one of a store that is silent does
		if d := took(1 + 80); d != 80*time.Second/8 {
			t.Errorf("80 MiB while a request is under way: %v", d)
		}
		q.End(meter.Read, meter.Now(), 4096, false)
		time.Sleep(idleAfter / 2)
		request()
		if d := took(8); d == 0 || d > time.Second {
			t.Errorf("8 MiB right after a request: %v", d)
		}
		time.Sleep(idleAfter)
		if d := took(1000); d != 0 {
			t.Errorf("a second after the last request: %v", d)
		}
		request()
		if d := took(1 + 4); d != 4*time.Second/8 {
			t.Errorf("4 MiB after another request: %v", d)
		}
	})
}

// TestPaceByDefault: without a rate of its own a volume has that of all.
func TestPaceByDefault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHydration(&volume{meter: &meter.Meter{}})
		q := h.w.meter.NewQueue()
		q.Begin()
		begun := time.Now()
		for range 1 + 64 {
			if err := h.pace(t.Context(), 1<<20); err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(begun); d != 2*time.Second {
			t.Errorf("64 MiB at 32 MiB/s: %v", d)
		}
	})
}

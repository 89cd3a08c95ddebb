package sparse

import (
	"testing"

	"holdfast/blockdev"
)

// TestNobodyToGiveWayTo: work that waited for its turn does not give way to who has just
// ended theirs.
func TestNobodyToGiveWayTo(t *testing.T) {
	const id = blockdev.ID("vol-00000000000000000000000000")
	var all turns
	for range 5000 {
		_, end, ok := all.takeFree(t.Context(), id)
		if !ok {
			t.Fatal("nobody has the turn, and it is not free")
		}
		gaveWay := make(chan bool)
		go func() {
			work, done, err := all.takeYielding(t.Context(), id)
			if err != nil {
				t.Error(err)
				gaveWay <- true
				return
			}
			defer done()
			gaveWay <- work.Err() != nil
		}()
		for waits := false; !waits; {
			all.mu.Lock()
			waits = all.at[id].users == 2
			all.mu.Unlock()
		}
		end()
		if <-gaveWay {
			t.Fatal("it gave way to nobody")
		}
		for there := true; there; {
			all.mu.Lock()
			there = all.at[id] != nil
			all.mu.Unlock()
		}
	}
}

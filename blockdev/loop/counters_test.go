package loop

import (
	"testing"

	"holdfast/blockdev"
)

func TestParseStat(t *testing.T) {
	const line = "   10    1   96   5   20    2   160   7   0   9   12   3   0   8   1   4   2\n" // as of Linux 5.5
	got, err := parseStat(line)
	want := blockdev.Counters{Reads: 10, ReadBytes: 96 * 512, Writes: 20, WriteBytes: 160 * 512, Discards: 3, DiscardBytes: 8 * 512, Flushes: 4}
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "1 2 3 4 5 6 7 8 9 10 11"} {
		if _, err := parseStat(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

package worker

import (
	"testing"
	"time"
)

// TestStrangersDoNotFillTheLog: of many connections in a second one is told of.
func TestStrangersDoNotFillTheLog(t *testing.T) {
	var x exposure
	told := 0
	for i := range 3000 {
		if x.mayTell(time.Unix(1000, 0).Add(time.Duration(i) * time.Millisecond)) {
			told++
		}
	}
	if told != 3 {
		t.Errorf("told %d times in 3 s", told)
	}
}

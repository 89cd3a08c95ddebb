package sys

import (
	"strings"
	"testing"
)

func TestParseStartTime(t *testing.T) {
	const rest = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21"
	for _, name := range []string{"cat", "a b", "x) S 1 (y", "("} {
		if got, err := parseStartTime("12 (" + name + ")" + rest); err != nil || got != 4242 {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "12 cat S", "12 (cat) S 1 2", strings.Replace("12 (cat)"+rest, "4242", "x", 1)} {
		if _, err := parseStartTime(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

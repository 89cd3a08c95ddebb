package bytesize

import (
	"math"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		text  string
		plain int64
		want  int64
		ok    bool
	}{
		{"20GiB", 1, 20 << 30, true},
		{"512", 1 << 20, 512 << 20, true},
		{"512", 1, 512, true},
		{"1 TB", 1, 1e12, true},
		{"7B", 1 << 20, 7, true},
		{"0", 1, 0, true},
		{"9223372036854775807", 1, math.MaxInt64, true},
		{"9223372036854775808", 1, 0, false},
		{"9007199254740992KiB", 1, 0, false},
		{"-1", 1, 0, false},
		{"1.5GiB", 1, 0, false},
		{"GiB", 1, 0, false},
		{"", 1, 0, false},
		{"12 parsecs", 1, 0, false},
	} {
		got, err := Parse(c.text, c.plain)
		if (err == nil) != c.ok || got != c.want {
			t.Errorf("Parse(%q, %d) = %d, %v", c.text, c.plain, got, err)
		}
	}
}

func TestFormatIsReadBack(t *testing.T) {
	for _, n := range []int64{0, 1, 1023, 1 << 10, 3 << 20, 20 << 30, 64 << 40, math.MaxInt64, 1000} {
		back, err := Parse(Format(n), 1)
		if err != nil || back != n {
			t.Errorf("Format(%d) = %q, read as %d, %v", n, Format(n), back, err)
		}
	}
}

func TestHuman(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1 << 10: "1 KiB", 1536: "1.5 KiB", 5 << 30: "5 GiB", 123456789: "118 MiB", 64 << 40: "64 TiB"} {
		if got := Human(n); got != want {
			t.Errorf("Human(%d) = %q, want %q", n, got, want)
		}
	}
}

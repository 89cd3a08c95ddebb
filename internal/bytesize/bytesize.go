package bytesize

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

var units = []struct {
	suffix string
	bytes  int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1},
}

// Parse reads "512MiB", "20GiB", "1TB" or a plain number, which counts in the
// given unit (1: bytes, 1<<20: MiB).
func Parse(text string, plain int64) (int64, error) {
	number, unit := strings.TrimSpace(text), plain
	for _, u := range units {
		if digits, ok := strings.CutSuffix(number, u.suffix); ok {
			number, unit = strings.TrimSpace(digits), u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || int64(n) > math.MaxInt64/unit { //nolint:gosec // 63 bits
		return 0, fmt.Errorf("%q is not a size such as 512MiB or 20GiB", text)
	}
	return int64(n) * unit, nil //nolint:gosec // 63 bits
}

// Format writes n exactly, in the largest binary unit that divides it.
func Format(n int64) string {
	for i := 3; i >= 0; i-- {
		if u := units[i]; n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}

// Human writes n in three digits or so, for tables.
func Human(n int64) string {
	if n < 1<<10 {
		return strconv.FormatInt(n, 10) + " B"
	}
	f, i := float64(n)/(1<<10), 0
	for f >= 1024 && i < 3 {
		f /= 1024
		i++
	}
	digits := 1
	if f >= 100 || f == math.Trunc(f) {
		digits = 0
	}
	return strconv.FormatFloat(f, 'f', digits, 64) + " " + units[i].suffix
}

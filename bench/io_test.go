package bench

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// TestMedianWithin: the interval holds the true median as often as it says, and
// leaves out what the tables of the sign test say.
func TestMedianWithin(t *testing.T) {
	for n, outside := range map[int]int{1: 0, 5: 0, 6: 0, 9: 1, 15: 3, 20: 5, 25: 7} {
		values := make([]float64, n)
		for i := range values {
			values[i] = float64(n - i)
		}
		m, low, high := medianWithin(values)
		if m != float64(n+1)/2 || low != float64(1+outside) || high != float64(n-outside) {
			t.Errorf("of %d: %v, %v to %v", n, m, low, high)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	missed := 0
	for range 2000 {
		values := make([]float64, 15)
		for i := range values {
			values[i] = r.NormFloat64()
		}
		if _, low, high := medianWithin(values); low > 0 || high < 0 {
			missed++
		}
	}
	if missed > 100 {
		t.Errorf("%d of 2000 intervals miss the median", missed)
	}
}

// TestQuickIO takes two jobs on every path: the bench itself must not rot.
func TestQuickIO(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	program := filepath.Join(t.TempDir(), "holdfast")
	build := exec.Command("go", "build", "-o", program, "holdfast/cmd/holdfast")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b := IO{Setting: Setting{Dir: t.TempDir(), Quick: true, Log: t.Output()}, Program: program}
	report, err := b.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Rows) != 6 {
		t.Errorf("%d rows", len(report.Rows))
	}
	for _, row := range report.Rows {
		if row.Ratio <= 0 && row.Unit == "/s" {
			t.Errorf("nothing was measured for %q", row.Measure)
		}
	}
}

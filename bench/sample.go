package bench

import (
	"math"
	"slices"
	"time"
)

// samples are durations of one kind.
type samples []time.Duration

// time runs f and keeps how long it took; an error is returned and not kept.
func (s *samples) time(f func() error) error {
	start := time.Now()
	if err := f(); err != nil {
		return err
	}
	*s = append(*s, time.Since(start))
	return nil
}

// quantile is the nearest-rank quantile, 0 < q <= 1; 0 of no samples.
func (s samples) quantile(q float64) time.Duration {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Clone(s)
	slices.Sort(sorted)
	return sorted[max(int(math.Ceil(q*float64(len(sorted))))-1, 0)]
}

func (s samples) median() time.Duration { return s.quantile(0.5) }

// pairedRatio is the median of the ratios of samples taken in the same round.
func pairedRatio(ours, yardstick samples) float64 {
	n := min(len(ours), len(yardstick))
	if n == 0 {
		return 0
	}
	ratios := make([]float64, n)
	for i := range n {
		ratios[i] = float64(ours[i]) / float64(yardstick[i])
	}
	slices.Sort(ratios)
	return ratios[n/2]
}

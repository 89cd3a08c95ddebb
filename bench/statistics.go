package bench

import (
	"math"
	"slices"
)

// medianWithin gives the median and the interval that holds the true one with at
// least 95 %, by the order of the values: how many lie below it is binomial with
// one half. Fewer than six values have no such interval; theirs is all of them.
func medianWithin(values []float64) (median, low, high float64) {
	n := len(values)
	if n == 0 {
		return 0, 0, 0
	}
	sorted := slices.Sorted(slices.Values(values))
	median = (sorted[(n-1)/2] + sorted[n/2]) / 2
	outside, below := 0, 0.0 // values to leave out on each side; the chance that the median lies beyond them
	for chance := math.Pow(0.5, float64(n)); ; outside++ {
		if below += chance; below > 0.025 {
			break
		}
		chance *= float64(n-outside) / float64(outside+1)
	}
	outside = max(0, outside-1)
	return median, sorted[outside], sorted[n-1-outside]
}

// ratiosOf are those of values of the same rounds.
func ratiosOf(ours, beside []float64) []float64 {
	ratios := make([]float64, min(len(ours), len(beside)))
	for i := range ratios {
		ratios[i] = ours[i] / beside[i]
	}
	return ratios
}

// quantileOf is the nearest-rank quantile of sorted values, 0 < q <= 1; 0 of none.
func quantileOf(sorted []uint32, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[max(int(math.Ceil(q*float64(len(sorted))))-1, 0)])
}

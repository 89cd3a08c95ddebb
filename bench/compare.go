package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// Verdicts of a comparison. What the intervals do not tell apart is no difference.
const (
	verdictBetter = "better"
	verdictWorse  = "worse"
	verdictSame   = "no difference shown"
	verdictNone   = "not told: no interval"
)

// ReadReport reads a report that a bench has written.
func ReadReport(path string) (r Report, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("%s is no report: %w", path, err)
	}
	return r, nil
}

// CompareReports holds what b's rows say against a's. What they compare are ratios to
// yardsticks of their own rounds, so that the two may come from different days and,
// with care, from different machines.
func CompareReports(a, b Report) Report {
	out := Report{Name: fmt.Sprintf("%s: %s and %s", b.Name, a.Time.Format(time.DateTime), b.Time.Format(time.DateTime)), Time: time.Now().UTC(), Host: b.Host}
	type key struct{ measure, yardstick string }
	before := map[key]Row{}
	for _, row := range a.Rows {
		before[key{row.Measure, row.Yardstick}] = row
	}
	unmatched := 0
	for _, now := range b.Rows {
		k := key{now.Measure, now.Yardstick}
		was, ok := before[k]
		if !ok {
			unmatched++
			continue
		}
		delete(before, k)
		out.Rows = append(out.Rows, compareRows(was, now))
	}
	if n := unmatched + len(before); n > 0 {
		out.Notes = append(out.Notes, fmt.Sprintf("%d rows are in one of the two alone.", n))
	}
	if a.Host.CPU != b.Host.CPU || a.Host.Kernel != b.Host.Kernel || a.Host.CPUs != b.Host.CPUs {
		out.Notes = append(out.Notes, fmt.Sprintf("The machines differ: %s, %d CPUs, %s; and %s, %d CPUs, %s.",
			a.Host.Kernel, a.Host.CPUs, a.Host.CPU, b.Host.Kernel, b.Host.CPUs, b.Host.CPU))
	}
	out.Notes = append(out.Notes, "Ratio: the later report's ratio to its yardstick, to the earlier one's. Two ratios are told apart when their 95 % intervals do not overlap, which is a careful test: small differences need a comparison of two commits, in the same rounds.")
	return out
}

func compareRows(was, now Row) Row {
	row := Row{Measure: now.Measure, Unit: now.Unit, Samples: now.Samples, P50: now.P50, Yardstick: "earlier, beside " + now.Yardstick, Beside: was.P50, Job: now.Job, Path: now.Path}
	switch {
	case now.Ratio > 0 && was.Ratio > 0:
		row.Ratio = now.Ratio / was.Ratio
	case was.P50 > 0:
		row.Ratio = now.P50 / was.P50
	}
	row.Note = verdict(was, now)
	return row
}

func verdict(was, now Row) string {
	higher, lower := verdictBetter, verdictWorse
	if now.Unit != "/s" && now.Unit != "MiB/s" && now.Unit != "MB/s" { // times and costs
		higher, lower = lower, higher
	}
	switch {
	case was.High == 0 || now.High == 0:
		return verdictNone
	case now.Low > was.High:
		return higher
	case now.High < was.Low:
		return lower
	}
	return verdictSame
}

package bench

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// jobFiles are the loads, as fio reads them.
//
//go:embed jobs/*.fio
var jobFiles embed.FS

// IO measures the paths to a volume's bytes with fio: a server of ours over NBD,
// the same file without anybody in between, and qemu-nbd. All of them take their
// turn in each round, in another order.
type IO struct {
	Setting               // Rounds: 0: 15; Quick: three rounds of two short jobs
	Each    time.Duration // of each job on each path; 0: 3 s
	Program string        // the holdfast that serves; "" is this program
	Only    string        // jobs whose name contains it

	paths  []*ioPath
	report Report
}

// ioGoals are the least medians of the ratios of one job, 0 where there is none. The
// peer is not to be better where notWorse is set.
type ioGoals struct {
	raw, peer float64
	notWorse  bool
	cpu       float64 // most µs of the server's CPU for each request
}

var nbdGoals = map[string]ioGoals{
	"randread-4k-qd1":   {raw: 0.65, peer: 1.2, cpu: 50},
	"randread-4k-qd8":   {raw: 0.50, peer: 1.1},
	"randread-4k-qd32":  {raw: 0.75, peer: 1.2, cpu: 11},
	"randwrite-4k-qd1":  {raw: 0.60, peer: 1.1},
	"randwrite-4k-qd8":  {raw: 0.60, peer: 1.0},
	"randwrite-4k-qd32": {raw: 0.75, peer: 1.1},
	"read-1m-qd8":       {raw: 0.8, notWorse: true},
	"write-1m-qd8":      {raw: 0.8, notWorse: true},
}

// The paths, by their place in IO.paths.
const (
	pathRaw = iota
	pathNBD
	pathQemuNBD
	pathCount
)

// Run measures everything and cleans up.
func (b *IO) Run(ctx context.Context) (_ Report, err error) {
	if b.Rounds == 0 {
		b.Rounds = 15
	}
	if b.Each == 0 {
		b.Each = 3 * time.Second
	}
	size := int64(1 << 30)
	if b.Quick {
		b.Rounds, b.Each, size = 3, 200*time.Millisecond, 64<<20
	}
	b.report = Report{Name: "The paths to a volume's bytes", Time: time.Now().UTC(), Host: hostFacts(b.Dir)}
	image := filepath.Join(b.Dir, "image")
	if err := fillImage(image, size); err != nil {
		return b.report, err
	}
	if err := b.start(ctx, image); err != nil {
		return b.report, errors.Join(err, b.stop())
	}
	defer func() { err = errors.Join(err, b.stop()) }()
	for _, job := range b.jobs() {
		if err := b.measure(ctx, job, size); err != nil {
			return b.report, err
		}
	}
	b.report.Host.LoadAfter = load()
	b.report.Notes = append(b.report.Notes,
		"Ratios are medians of those of each round, in requests; their 95 % intervals come from the order of the rounds' ratios and assume nothing of how they are spread. A goal is met when the median reaches it and the interval's lower end is within 5 % of it.",
		"\"Raw file\" is the same file on the same file system in the same round, by fio with io_uring and direct I/O. Servers open it with O_DIRECT as well; qemu-nbd has --cache=none --aio=io_uring.")
	return b.report, nil
}

func (b *IO) jobs() (names []string) {
	entries, err := jobFiles.ReadDir("jobs")
	if err != nil {
		panic(err) // they are in the program
	}
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".fio")
		if strings.Contains(name, b.Only) && (!b.Quick || name == "randread-4k-qd32" || name == "fsync-4k-qd1") {
			names = append(names, name)
		}
	}
	return names
}

// fillImage writes a file with data everywhere, and flushes it.
func fillImage(path string, size int64) error {
	chunk := make([]byte, 4<<20)
	random := rand.New(rand.NewPCG(2, uint64(size)))
	for i := range chunk {
		chunk[i] = byte(random.Uint32())
	}
	if err := writeFile(path, chunk, size, random); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// measure takes all rounds of one job.
func (b *IO) measure(ctx context.Context, job string, size int64) error {
	taken := make([][]ioSample, pathCount)
	for round := range b.Rounds {
		for turn := range pathCount {
			p := (round + turn) % pathCount
			s, err := b.paths[p].run(ctx, job, b.Each, size)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", job, b.paths[p].name, err)
			}
			taken[p] = append(taken[p], s)
		}
	}
	b.tell(job, taken)
	return nil
}

// tell makes the rows of a job.
func (b *IO) tell(job string, taken [][]ioSample) {
	goals := nbdGoals[job]
	ours := taken[pathNBD]
	for _, other := range []int{pathRaw, pathQemuNBD} {
		ratios := make([]float64, len(ours))
		for i := range ours {
			ratios[i] = ours[i].iops / taken[other][i].iops
		}
		m, low, high := medianWithin(ratios)
		row := Row{
			Measure: job + ": NBD beside " + b.paths[other].name, Unit: "/s", Samples: len(ours), P50: medianOf(ours, ioSample.rate),
			Yardstick: b.paths[other].name, Beside: medianOf(taken[other], ioSample.rate), Ratio: m,
			Note: fmt.Sprintf("ratio %.2f, 95 %% interval %.2f to %.2f; latency p50/p99/p99.9 %s µs, the yardstick's %s µs; client's CPU %.1f µs a request, beside it %.1f",
				m, low, high, latencies(ours), latencies(taken[other]), medianOf(ours, ioSample.clientCPU), medianOf(taken[other], ioSample.clientCPU)),
		}
		goal := goals.raw
		if other == pathQemuNBD {
			goal = goals.peer
		}
		switch {
		case goal > 0:
			row.Goal, row.Met = fmt.Sprintf("≥ %.2f", goal), m >= goal && low >= 0.95*goal
		case other == pathQemuNBD && goals.notWorse:
			row.Goal, row.Met = "not worse", high >= 1
		}
		b.report.Rows = append(b.report.Rows, row)
		b.say("%-18s beside %-9s %.2f (%.2f to %.2f)", job, b.paths[other].name, m, low, high)
	}
	cpu := Row{
		Measure: job + ": NBD server's CPU a request", Unit: "µs", Samples: len(ours), P50: medianOf(ours, ioSample.serverCPU),
		Yardstick: b.paths[pathQemuNBD].name, Beside: medianOf(taken[pathQemuNBD], ioSample.serverCPU),
	}
	if cpu.Beside > 0 {
		cpu.Ratio = cpu.P50 / cpu.Beside
	}
	if goals.cpu > 0 {
		cpu.Goal, cpu.Met = fmt.Sprintf("≤ %.0f µs, and less", goals.cpu), cpu.P50 <= goals.cpu && cpu.P50 < cpu.Beside
	}
	b.report.Rows = append(b.report.Rows, cpu)
}

func medianOf(samples []ioSample, of func(ioSample) float64) float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	m, _, _ := medianWithin(values)
	return m
}

func latencies(samples []ioSample) string {
	return fmt.Sprintf("%.0f/%.0f/%.0f", medianOf(samples, func(s ioSample) float64 { return s.p50 }),
		medianOf(samples, func(s ioSample) float64 { return s.p99 }), medianOf(samples, func(s ioSample) float64 { return s.p999 }))
}

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

package bench

import "fmt"

// ioPair holds one path against another.
type ioPair struct {
	ours, beside string
	goals        map[string]float64 // least median of the ratios, by job
	notWorse     []string           // jobs that the noise does not resolve: ours is not to be worse
	cpu          map[string]float64 // most µs of the server's CPU for each request; and less than beside takes
	twice        bool               // the server's CPU is to be at most twice what beside takes
}

var mountGoals = map[string]float64{"randread-4k-qd1": 0.9, "randwrite-4k-qd1": 0.9, "randread-4k-qd32": 0.85, "randwrite-4k-qd32": 0.85}

// Of copy-on-write beside the same path without it.
var (
	hitGoals   = map[string]float64{"randread-4k-qd1": 0.95, "randwrite-4k-qd1": 0.95, "randread-4k-qd32": 0.95, "randwrite-4k-qd32": 0.95}
	firstGoals = map[string]float64{"first-write-4k-qd1": 0.85, "first-write-4k-qd32": 0.85}
)

// ioPairs are what is told of the paths.
func ioPairs() []ioPair {
	large := []string{"read-1m-qd8", "write-1m-qd8"}
	return []ioPair{
		{ours: "raw-thread", beside: "raw"},
		{ours: "vhost", beside: "raw-thread"},
		{ours: "nbd", beside: "raw-thread"},
		{ours: "vhost", beside: "raw", goals: map[string]float64{
			"randread-4k-qd1": 0.85, "randread-4k-qd8": 0.85, "randread-4k-qd32": 0.85,
			"randwrite-4k-qd1": 0.90, "randwrite-4k-qd8": 0.90, "randwrite-4k-qd32": 0.90,
			"read-1m-qd8": 0.8, "write-1m-qd8": 0.6,
		}},
		{ours: "vhost", beside: "qsd-vhost", notWorse: large, goals: map[string]float64{
			"randread-4k-qd1": 1.10, "randread-4k-qd8": 1.05, "randread-4k-qd32": 1.05,
			"randwrite-4k-qd1": 1.15, "randwrite-4k-qd8": 1.05, "randwrite-4k-qd32": 1.0,
		}, cpu: map[string]float64{"randread-4k-qd1": 38, "randread-4k-qd32": 5.5}},
		{ours: "nbd", beside: "raw", goals: map[string]float64{
			"randread-4k-qd1": 0.65, "randread-4k-qd8": 0.50, "randread-4k-qd32": 0.75,
			"randwrite-4k-qd1": 0.60, "randwrite-4k-qd8": 0.60, "randwrite-4k-qd32": 0.75,
			"read-1m-qd8": 0.8, "write-1m-qd8": 0.8,
		}},
		{ours: "nbd", beside: "qemu-nbd", notWorse: large, goals: map[string]float64{
			"randread-4k-qd1": 1.2, "randread-4k-qd8": 1.1, "randread-4k-qd32": 1.2,
			"randwrite-4k-qd1": 1.1, "randwrite-4k-qd8": 1.0, "randwrite-4k-qd32": 1.1,
		}, cpu: map[string]float64{"randread-4k-qd1": 50, "randread-4k-qd32": 11}},
		{ours: "nbd", beside: "qsd-nbd"},
		{ours: "nbd", beside: "nbdkit"},
		{ours: "mount", beside: "raw", goals: mountGoals},
		{ours: "mount-xfs", beside: "raw", goals: mountGoals},
		{ours: "mount", beside: "mount-buffered"},
		{ours: "mount", beside: "mount-4k"},
		{ours: "mount", beside: "mount-tuned"},
		{ours: "mount-buffered", beside: "raw"},
		{ours: "loop", beside: "raw"},
		{ours: "pool", beside: "raw"},
		{ours: "vhost-cow-first", beside: "vhost-sparse", goals: firstGoals, twice: true},
		{ours: "vhost-cow-first", beside: "qcow2-vhost-first"},
		{ours: "nbd-cow-first", beside: "nbd-sparse", goals: firstGoals, twice: true},
		{ours: "nbd-cow-first", beside: "qcow2-nbd-first"},
		{ours: "vhost-cow-base", beside: "vhost", goals: hitGoals},
		{ours: "vhost-cow", beside: "vhost", goals: hitGoals},
		{ours: "vhost-cow", beside: "qcow2-vhost"},
		{ours: "nbd-cow", beside: "nbd", goals: hitGoals},
		{ours: "nbd-cow", beside: "qcow2-nbd"},
		{ours: "nbd-tls", beside: "qemu-nbd-tls"},
		{ours: "nbd-tls", beside: "nbdkit-tls"},
		{ours: "nbd-tls", beside: "nbd"},
	}
}

var ioNotes = []string{
	"Ratios are medians of those of each round, in requests; their 95 % intervals come from the order of the rounds' ratios and assume nothing of how they are spread. A goal is met when the median reaches it and the interval's lower end is within 5 % of it; \"not worse\" when the interval's upper end is at least 1.",
	"\"Raw file\" is the same file on the same file system in the same round, by fio with io_uring and direct I/O. Servers open it with O_DIRECT as well (qemu's with aio=io_uring); nbdkit goes through the page cache: it reads a file of its own from there, and its writes would not compare.",
	"\"Raw file by another thread\": our load generator hands its requests to a thread of its own process, which does them on the raw file by io_uring. Both wake each other by eventfds, as a guest and a vhost-user server do; there is no protocol, no second process and no limit. It is what handing over costs on this machine, and so about the most that a server can reach. Both threads are the client's CPU.",
	"vhost-user-blk is driven by our own load generator, ours and qemu-storage-daemon's alike: one queue, one thread, the same jobs, of which it reads fio's files. All else is driven by fio.",
	"NBD over TLS is TLS 1.3 on the loopback address, with certificates on both sides, and each end's own choice of a cipher: ours takes AES-128-GCM, GnuTLS's servers (qemu-nbd, nbdkit) take AES-256-GCM. The client is the same for all, fio by libnbd and GnuTLS.",
	"CPU is of the server and of the client, in µs a request. The kernel's own threads (loop devices are served by them) are in the machine's alone, together with whatever else ran.",
}

// tell makes the rows of a job.
func (b *IO) tell(j ioJob, taken map[string][]ioSample) {
	for _, pair := range b.pairs {
		if len(taken[pair.ours]) == 0 || len(taken[pair.beside]) == 0 {
			continue
		}
		row := b.row(pair, j, taken[pair.ours], taken[pair.beside])
		b.report.Rows = append(b.report.Rows, row)
		b.say("%-18s %-9s beside %-9s %.2f (%.2f to %.2f)", j.name, pair.ours, pair.beside, row.Ratio, row.Low, row.High)
		if goal := pair.cpu[j.name]; goal > 0 {
			b.report.Rows = append(b.report.Rows, b.cpuRow(pair, j, goal, taken[pair.ours], taken[pair.beside]))
		} else if pair.twice {
			b.report.Rows = append(b.report.Rows, b.twiceRow(pair, j, taken[pair.ours], taken[pair.beside]))
		}
	}
}

func cpuFigures(samples []ioSample) *CPU {
	return &CPU{Server: medianOf(samples, ioSample.serverCPU), Client: medianOf(samples, ioSample.clientCPU), Machine: medianOf(samples, ioSample.machineCPU)}
}

func (b *IO) row(pair ioPair, j ioJob, ours, beside []ioSample) Row {
	m, low, high := medianWithin(ratiosOf(valuesOf(ours, ioSample.rate), valuesOf(beside, ioSample.rate)))
	row := Row{
		Measure: j.name + ": " + b.named(pair.ours), Unit: "/s", Samples: len(ours), P50: medianOf(ours, ioSample.rate),
		Yardstick: b.named(pair.beside), Beside: medianOf(beside, ioSample.rate), Ratio: m,
		Job: j.name, Path: pair.ours, Against: pair.beside, Least: pair.goals[j.name], Low: low, High: high,
		Latency: latenciesOf(ours), BesideLatency: latenciesOf(beside), CPU: cpuFigures(ours), BesideCPU: cpuFigures(beside),
	}
	if goal := pair.goals[j.name]; goal > 0 {
		row.Goal, row.Met = fmt.Sprintf("≥ %.2f", goal), m >= goal && low >= 0.95*goal
	}
	for _, name := range pair.notWorse {
		if name == j.name {
			row.Goal, row.Met = "not worse", high >= 1
		}
	}
	return row
}

func (b *IO) cpuRow(pair ioPair, j ioJob, goal float64, ours, beside []ioSample) Row {
	row := b.costs(pair, j, ours, beside)
	row.Goal, row.Met = fmt.Sprintf("≤ %g µs, and less", goal), row.P50 <= goal && row.Ratio < 1
	return row
}

func (b *IO) twiceRow(pair ioPair, j ioJob, ours, beside []ioSample) Row {
	row := b.costs(pair, j, ours, beside)
	row.Goal, row.Met = "≤ 2 × the yardstick", row.Ratio <= 2
	return row
}

// costs compares the CPU that servers take.
func (b *IO) costs(pair ioPair, j ioJob, ours, beside []ioSample) Row {
	row := Row{
		Measure: j.name + ": CPU of the server of " + b.named(pair.ours), Unit: "µs", Samples: len(ours), P50: medianOf(ours, ioSample.serverCPU),
		Yardstick: b.named(pair.beside), Beside: medianOf(beside, ioSample.serverCPU), Job: j.name, Path: pair.ours, Against: pair.beside,
	}
	row.Ratio, row.Low, row.High = medianWithin(ratiosOf(valuesOf(ours, ioSample.serverCPU), valuesOf(beside, ioSample.serverCPU)))
	return row
}

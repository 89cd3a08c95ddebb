package bench

import (
	"context"
	"errors"
	"fmt"

	"strings"
	"time"
)

// Worker measures what a server costs that nobody asks for anything: CPU and
// memory, ours and others'. Each has done some work before.
type Worker struct {
	Setting        // one round; Quick: watched for a second
	Program string // the holdfast that serves; "" is this program
}

// workerMost is the memory that an idle worker may have, in MB.
const workerMost = 8

// restSeconds is how long servers may do what is left to do when nothing is asked any
// more: a worker gives back what handshakes took.
const restSeconds = 5

// Run measures everything and cleans up.
func (w *Worker) Run(ctx context.Context) (_ Report, err error) {
	b := IO{Setting: w.Setting, Program: w.Program, Paths: "vhost,qsd-vhost,nbd,qemu-nbd,nbd-tls,qemu-nbd-tls", Only: "randread-4k-qd32"}
	if err := b.defaults(); err != nil {
		return Report{}, err
	}
	b.report = Report{Name: "Idle workers", Time: time.Now().UTC(), Host: hostFacts(w.Dir)}
	jobs, err := b.jobs()
	if err != nil {
		return b.report, err
	}
	if err := fillImage(b.image, b.size); err != nil {
		return b.report, err
	}
	defer func() { err = errors.Join(err, b.stop()) }()
	if err := b.start(ctx); err != nil {
		return b.report, err
	}
	for _, p := range b.paths {
		if _, err := p.measureOnce(ctx, jobs[0], b.Each); err != nil {
			return b.report, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	idle, err := w.watch(ctx, b.paths)
	if err != nil {
		return b.report, err
	}
	for _, pair := range []struct{ ours, beside string }{{"vhost", "qsd-vhost"}, {"nbd", "qemu-nbd"}, {"nbd-tls", "qemu-nbd-tls"}} {
		b.report.Rows = append(b.report.Rows, w.rows(&b, pair.ours, pair.beside, idle)...)
	}
	b.report.Host.LoadAfter = load()
	b.report.Notes = append(b.report.Notes, "CPU is in ticks of the clock, 100 a second, of all threads of the process. Memory is resident: the program's own file, of which all workers of a host share one copy, is in it. Servers are watched from five seconds after the last request on.")
	return b.report, nil
}

// idleWorker is what a server took while nothing was asked of it.
type idleWorker struct {
	ticks           float64
	memory, private float64 // MB
}

// watch waits while nothing is asked of any server.
func (w *Worker) watch(ctx context.Context, paths []*ioPath) (map[string]idleWorker, error) {
	seconds := idleSeconds
	if w.Quick {
		seconds = 1
	}
	if !w.Quick {
		if err := w.pause(ctx, restSeconds); err != nil {
			return nil, err
		}
	}
	w.say("nothing, for %d s", seconds)
	idle, before := map[string]idleWorker{}, map[string]float64{}
	for _, p := range paths {
		var err error
		if before[p.key], err = p.serverCost(); err != nil {
			return nil, err
		}
	}
	if err := w.pause(ctx, seconds); err != nil {
		return nil, err
	}
	for _, p := range paths {
		if p.server == 0 {
			continue
		}
		after, err := p.serverCost()
		if err != nil {
			return nil, err
		}
		one := idleWorker{ticks: (after - before[p.key]) / 10_000}
		if one.memory, one.private, err = memoryOf(p.server); err != nil {
			return nil, err
		}
		idle[p.key] = one
	}
	return idle, nil
}

func (w *Worker) pause(ctx context.Context, seconds int) error {
	select {
	case <-time.After(time.Duration(seconds) * time.Second):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// rows tells of one of ours, beside another's if that is here.
func (w *Worker) rows(b *IO, ours, beside string, idle map[string]idleWorker) []Row {
	one, other := idle[ours], idle[beside]
	seconds := idleSeconds
	if w.Quick {
		seconds = 1
	}
	cpu := Row{Measure: fmt.Sprintf("CPU over %d s of an idle server of %s", seconds, b.named(ours)), Unit: "ticks", Samples: 1, P50: one.ticks,
		Goal: "0", Met: one.ticks == 0}
	memory := Row{Measure: "memory of an idle server of " + b.named(ours), Unit: "MB", Samples: 1, P50: one.memory,
		Goal: fmt.Sprintf("≤ %d MB", workerMost), Met: one.memory <= workerMost, Note: fmt.Sprintf("%.1f MB of it are its own", one.private)}
	if other.memory > 0 {
		cpu.Yardstick, cpu.Beside = b.named(beside), other.ticks
		memory.Yardstick, memory.Beside, memory.Ratio = b.named(beside), other.memory, one.memory/other.memory
		memory.Note += fmt.Sprintf(", %.1f MB of the other's", other.private)
	}
	w.say("%s: %.0f ticks, %.1f MB (beside it %.1f)", ours, one.ticks, one.memory, other.memory)
	return []Row{cpu, memory}
}

// memoryOf is a process's resident memory, and its anonymous part, in MB.
func memoryOf(pid int) (resident, private float64, err error) {
	for key, to := range map[string]*float64{"VmRSS": &resident, "RssAnon": &private} {
		text := field(fmt.Sprintf("/proc/%d/status", pid), key)
		var kib float64
		if _, err := fmt.Sscan(strings.TrimSuffix(text, " kB"), &kib); err != nil {
			return 0, 0, fmt.Errorf("%s of process %d is %q: %w", key, pid, text, err)
		}
		*to = kib * 1024 / 1e6
	}
	return resident, private, nil
}

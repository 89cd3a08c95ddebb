package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"holdfast/api/client"
	"holdfast/internal/localdaemon"
	"holdfast/internal/run"
)

// Limits measures how well an attachment's rate limits hold: what fio gets in a
// real container, beside what was asked for.
type Limits struct {
	Setting               // Rounds: 0: 3; Quick: one measure of each kind, one round: a smoke test of the bench itself
	Each    time.Duration // measure; 0: 5 s

	d      *localdaemon.Daemon
	at     client.Attachment
	report Report
}

const (
	limitsVolume    = "limited"
	limitsContainer = "holdfast-bench-limits"
	limitsGoal      = "within 5 % of the limit"
	limitsBound     = "at most 5 % above the limit"
)

// limitCase is one measure: a limit and a load that would go beyond it.
type limitCase struct {
	name   string
	limits client.RateLimits
	fio    [][]string // one after the other: run at once
	unit   string     // "/s", "MB/s"
	of     func(r ioRates) float64
	limit  float64 // in unit
	device bool    // measured at the device: the page cache takes writes that nobody flushes at any rate
	single bool    // one request at a time: only a bound from above can be asked for
	noGoal bool
	note   string
}

// ioRates are per second.
type ioRates struct{ reads, readBytes, writes, writeBytes float64 }

func (l *Limits) cases() []limitCase {
	direct := func(rw, block string) [][]string {
		return [][]string{{"--rw=" + rw, "--bs=" + block, "--direct=1", "--ioengine=libaio", "--iodepth=8"}}
	}
	buffered := func(rw, block string, more ...string) [][]string {
		return [][]string{append([]string{"--rw=" + rw, "--bs=" + block, "--ioengine=psync"}, more...)}
	}
	reads, writes := func(r ioRates) float64 { return r.reads }, func(r ioRates) float64 { return r.writes }
	readMB, writeMB := func(r ioRates) float64 { return r.readBytes / 1e6 }, func(r ioRates) float64 { return r.writeBytes / 1e6 }
	var all []limitCase
	iops, rates := []int64{200, 1000}, []int64{5e6, 20e6}
	if l.Quick {
		iops, rates = iops[:1], rates[:1]
	}
	for _, n := range iops {
		text := fmt.Sprintf(", limit %d/s", n)
		all = append(all,
			limitCase{name: "direct random reads of 4 KiB" + text, limits: client.RateLimits{ReadIOPS: n}, fio: direct("randread", "4k"), unit: "/s", of: reads, limit: float64(n)},
			limitCase{name: "direct random writes of 4 KiB" + text, limits: client.RateLimits{WriteIOPS: n}, fio: direct("randwrite", "4k"), unit: "/s", of: writes, limit: float64(n)},
			limitCase{name: "buffered random reads of 4 KiB" + text, limits: client.RateLimits{ReadIOPS: n}, fio: buffered("randread", "4k", "--invalidate=1", "--numjobs=4", fmt.Sprintf("--size=%dm", l.fileMiB()/4), fmt.Sprintf("--offset_increment=%dm", l.fileMiB()/4), "--fadvise_hint=random"), unit: "/s", of: reads, limit: float64(n)})
	}
	for _, n := range rates {
		text, mb := fmt.Sprintf(", limit %.0f MB/s", float64(n)/1e6), float64(n)/1e6
		all = append(all,
			limitCase{name: "direct reads of 1 MiB" + text, limits: client.RateLimits{ReadBytes: n}, fio: direct("read", "1m"), unit: "MB/s", of: readMB, limit: mb},
			limitCase{name: "direct writes of 1 MiB" + text, limits: client.RateLimits{WriteBytes: n}, fio: direct("write", "1m"), unit: "MB/s", of: writeMB, limit: mb},
			limitCase{name: "buffered reads of 1 MiB" + text, limits: client.RateLimits{ReadBytes: n}, fio: buffered("read", "1m", "--invalidate=1"), unit: "MB/s", of: readMB, limit: mb, single: true},
			limitCase{name: "buffered writes of 64 KiB, fsync each 16" + text, limits: client.RateLimits{WriteBytes: n}, fio: buffered("write", "64k", "--fsync=16"), unit: "MB/s", of: writeMB, limit: mb, single: true},
			limitCase{name: "O_SYNC writes of 64 KiB" + text, limits: client.RateLimits{WriteBytes: n}, fio: buffered("write", "64k", "--sync=1"), unit: "MB/s", of: writeMB, limit: mb, single: true})
	}
	n := rates[0]
	both := slices.Concat(direct("write", "256k"), buffered("write", "256k"))
	return append(all, limitCase{name: fmt.Sprintf("direct and buffered writes at once, limit %.0f MB/s", float64(n)/1e6), limits: client.RateLimits{WriteBytes: n}, fio: both,
		unit: "MB/s", of: writeMB, limit: float64(n) / 1e6, device: true, noGoal: true,
		note: "with cgroup v1 the limit holds for each way by itself, so up to twice it is possible"})
}

// Run measures everything and cleans up.
func (l *Limits) Run(ctx context.Context) (_ Report, err error) {
	if l.Rounds == 0 {
		l.Rounds = 3
	}
	if l.Each == 0 {
		l.Each = 5 * time.Second
	}
	if l.Quick {
		l.Rounds, l.Each = 1, time.Second
	}
	l.report = Report{Name: "Rate limits of attachments", Time: time.Now().UTC(), Host: hostFacts(l.Dir)}
	l.d, err = localdaemon.Start(ctx, l.Daemon, filepath.Join(l.Dir, "state"), "--pool-size", "2GiB", "--runc-root", l.runcRoot())
	if err != nil {
		return l.report, err
	}
	defer func() { err = errors.Join(err, l.d.Remove(context.WithoutCancel(ctx))) }()
	if err := l.setUp(ctx); err != nil {
		return l.report, errors.Join(err, l.tearDown(context.WithoutCancel(ctx)))
	}
	for _, c := range l.cases() {
		if err = l.measure(ctx, c); err != nil {
			break
		}
	}
	l.report.Host.LoadAfter = load()
	return l.report, errors.Join(err, l.tearDown(context.WithoutCancel(ctx)))
}

// fileMiB is the size of each file that fio works on.
func (l *Limits) fileMiB() int {
	if l.Quick {
		return 8
	}
	return 96
}

func (l *Limits) runcRoot() string { return filepath.Join(l.Dir, "runc") }

func (l *Limits) runc(ctx context.Context, args ...string) (string, error) {
	r, err := run.Run(ctx, run.Cmd{Args: append([]string{"runc", "--root", l.runcRoot()}, args...), Timeout: time.Minute})
	return string(r.Stdout), err
}

// setUp attaches a volume to a container that has the host's programs, and lays
// the files out that fio works on.
func (l *Limits) setUp(ctx context.Context) error {
	bundle := filepath.Join(l.Dir, "box")
	if err := limitsBundle(bundle); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(l.Dir, "box.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	start := run.Cmd{Args: []string{"runc", "--root", l.runcRoot(), "run", "--detach", "--bundle", bundle, limitsContainer}, Stdout: log, Stderr: log}
	if _, err := run.Run(ctx, start); err != nil {
		return fmt.Errorf("start a container: %w, see %s", err, log.Name())
	}
	_, err = l.d.Client.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: limitsVolume}, Spec: client.VolumeSpec{Size: 512}}, "")
	if err != nil {
		return err
	}
	l.at, err = l.d.Client.Attach(ctx, limitsVolume, client.Attachment{
		Holder: "sandbox:bench", Target: client.Target{Type: "runc", Container: limitsContainer}, MountPath: "/data",
		Limits: &client.RateLimits{ReadIOPS: 1e9}, // to be told how limits hold
	})
	if err != nil {
		return err
	}
	if e := l.at.Enforcement; e != nil {
		l.report.Notes = append(l.report.Notes, "Mechanism: "+e.Mechanism+".")
		for _, gap := range e.Gaps {
			l.report.Notes = append(l.report.Notes, "Not limited: "+gap+".")
		}
	}
	l.report.Notes = append(l.report.Notes, "Loads with one request at a time (through the page cache, O_SYNC) lose up to a timer tick of the kernel (4 ms at 250 Hz) on each request, and what the flushes take: they stay below their limit.")
	for job := range 2 {
		if _, err := l.runc(ctx, "exec", limitsContainer, "/usr/bin/dd", "if=/dev/zero", fmt.Sprintf("of=/data/f%d", job), "bs=1M", fmt.Sprintf("count=%d", l.fileMiB()), "conv=fsync"); err != nil {
			return err
		}
	}
	return nil
}

// limitsBundle is a container with the host's /usr, read-only.
func limitsBundle(dir string) error {
	rootfs := filepath.Join(dir, "rootfs")
	for _, d := range []string{"usr", "proc", "dev", "tmp", "data"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+d, filepath.Join(rootfs, d)); err != nil {
			return err
		}
	}
	spec := specs.Spec{
		Version: "1.0.2",
		Process: &specs.Process{
			Args: []string{"/usr/bin/sleep", "86400"}, Cwd: "/", Env: []string{"PATH=/usr/bin:/bin"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{},
		},
		Root: &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{
			{Destination: "/usr", Type: "bind", Source: "/usr", Options: []string{"rbind", "ro"}},
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=64m"}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=1777", "size=64m"}},
		},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}}},
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600)
}

func (l *Limits) tearDown(ctx context.Context) error {
	var failures error
	if l.at.ID != "" {
		_, err := l.d.Client.Detach(ctx, limitsVolume, l.at.ID)
		failures = errors.Join(failures, err)
	}
	_, err := l.runc(ctx, "delete", "--force", limitsContainer)
	return errors.Join(failures, err)
}

// measure sets a limit, loads the volume, and takes the median of the rounds.
func (l *Limits) measure(ctx context.Context, c limitCase) error {
	fmt.Fprintf(l.Log, "%s, %d rounds\n", c.name, l.Rounds)
	if _, err := l.d.Client.SetLimits(ctx, limitsVolume, l.at.ID, c.limits); err != nil {
		return err
	}
	var got []float64
	for range l.Rounds {
		r, err := l.load(ctx, c)
		if err != nil {
			return err
		}
		got = append(got, c.of(r))
	}
	slices.Sort(got)
	row := Row{Measure: c.name, Unit: c.unit, Samples: len(got), P50: got[len(got)/2], P99: got[len(got)-1],
		Yardstick: "the limit", Beside: c.limit, Ratio: got[len(got)/2] / c.limit, Note: c.note}
	switch {
	case c.noGoal:
	case c.single:
		row.Goal, row.Met = limitsBound, row.Ratio <= 1.05
	default:
		row.Goal, row.Met = limitsGoal, row.Ratio >= 0.95 && row.Ratio <= 1.05
	}
	l.report.Rows = append(l.report.Rows, row)
	return nil
}

// load runs the case's jobs at once and tells their rates: as fio has them, or as
// the device's counters do.
func (l *Limits) load(ctx context.Context, c limitCase) (ioRates, error) {
	before, err := l.d.Client.Stats(ctx, limitsVolume)
	if err != nil {
		return ioRates{}, err
	}
	start := time.Now()
	results := make(chan ioRates, len(c.fio))
	failures := make(chan error, len(c.fio))
	for job, args := range c.fio {
		go func() {
			r, err := l.fio(ctx, job, args)
			results <- r
			failures <- err
		}()
	}
	var sum ioRates
	for range c.fio {
		r := <-results
		err = errors.Join(err, <-failures)
		sum = ioRates{sum.reads + r.reads, sum.readBytes + r.readBytes, sum.writes + r.writes, sum.writeBytes + r.writeBytes}
	}
	if err != nil || !c.device {
		return sum, err
	}
	took := time.Since(start).Seconds()
	after, err := l.d.Client.Stats(ctx, limitsVolume)
	if err != nil {
		return ioRates{}, err
	}
	if before.IO == nil || after.IO == nil {
		return ioRates{}, errors.New("the device's I/O is not counted")
	}
	return ioRates{
		float64(after.IO.Reads-before.IO.Reads) / took, float64(after.IO.ReadBytes-before.IO.ReadBytes) / took,
		float64(after.IO.Writes-before.IO.Writes) / took, float64(after.IO.WriteBytes-before.IO.WriteBytes) / took,
	}, nil
}

// fio runs one job in the container. What it left dirty is flushed before it ends.
func (l *Limits) fio(ctx context.Context, job int, args []string) (ioRates, error) {
	out, err := l.runc(ctx, append([]string{"exec", limitsContainer, "/usr/bin/fio", "--name=limits", "--output-format=json", "--thread", "--group_reporting", "--end_fsync=1",
		fmt.Sprintf("--filename=/data/f%d", job), fmt.Sprintf("--size=%dm", l.fileMiB()), "--time_based", fmt.Sprintf("--runtime=%dms", l.Each.Milliseconds())}, args...)...)
	if err != nil {
		return ioRates{}, err
	}
	return ratesOf(out)
}

// ratesOf reads fio's report.
func ratesOf(out string) (ioRates, error) {
	type way struct {
		IOPS  float64 `json:"iops"`
		Bytes float64 `json:"bw_bytes"`
	}
	var report struct {
		Jobs []struct {
			Read  way `json:"read"`
			Write way `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil || len(report.Jobs) == 0 {
		return ioRates{}, fmt.Errorf("fio's report: %w: %.200q", err, out)
	}
	j := report.Jobs[0]
	return ioRates{j.Read.IOPS, j.Read.Bytes, j.Write.IOPS, j.Write.Bytes}, nil
}

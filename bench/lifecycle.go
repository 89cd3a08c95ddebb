package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/api/client"
	"holdfast/engine"
	"holdfast/internal/localdaemon"
	"holdfast/metadata"
)

// Lifecycle measures the life of volumes: create, list, grow, and an idle daemon.
type Lifecycle struct {
	Setting // Rounds: of the sequential measures; 0: 100; Quick: leave out the 5 GB template and seed fewer records: a smoke test of the bench itself

	d      *localdaemon.Daemon
	report Report
}

// overprovision lets the bench promise more than its pool has: nothing is written
// to most of its volumes.
const overprovision = "10000"

// Run measures everything and cleans up. The report is complete even when a goal
// is missed; an error is a measure that could not be taken.
func (l *Lifecycle) Run(ctx context.Context) (Report, error) {
	if l.Rounds == 0 {
		l.Rounds = 100
	}
	l.report = Report{Name: "Life cycle of volumes", Time: time.Now().UTC(), Host: hostFacts(l.Dir)}
	err := l.withDaemon(ctx, "state", nil, l.volumes)
	if err == nil {
		err = l.withDaemon(ctx, "seeded", func(state string) error { return l.seed(ctx, state, l.scale(100_000)) }, l.listing)
	}
	if err == nil {
		err = l.withDaemon(ctx, "idle", func(state string) error { return l.seed(ctx, state, l.scale(10_000)) }, l.idle)
	}
	l.report.Host.LoadAfter = load()
	return l.report, err
}

func (l *Lifecycle) scale(n int) int {
	if l.Quick {
		return n / 20
	}
	return n
}

// withDaemon starts a daemon on a fresh state directory, lets prepare work on
// the directory of one that was stopped, and measures.
func (l *Lifecycle) withDaemon(ctx context.Context, name string, prepare func(state string) error, measure func(context.Context) error) (err error) {
	state := filepath.Join(l.Dir, name)
	pool := "16GiB"
	if l.Quick || prepare != nil {
		pool = "2GiB"
	}
	l.d, err = localdaemon.Start(ctx, l.Daemon, state, "--pool-size", pool, "--overprovision", overprovision)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.d.Remove(context.WithoutCancel(ctx))) }()
	if prepare != nil {
		if err := l.d.Stop(); err != nil {
			return err
		}
		if err := prepare(state); err != nil {
			return err
		}
		if err := l.d.Restart(ctx); err != nil {
			return err
		}
	}
	return measure(ctx)
}

func (l *Lifecycle) volumes(ctx context.Context) error {
	for _, measure := range []func(context.Context) error{l.blank, l.templates, l.crowd, l.grow, l.growDetached} {
		if err := measure(ctx); err != nil {
			return err
		}
	}
	return nil
}

// create makes a volume and returns its name.
func (l *Lifecycle) create(ctx context.Context, size int64, template, fs string) (string, error) {
	v, err := l.d.Client.CreateVolume(ctx, client.Volume{Spec: client.VolumeSpec{Size: size, Template: template, Filesystem: fs}}, "")
	if err == nil && v.Status != "DEPLOYED" {
		err = fmt.Errorf("volume %s is %s", v.Metadata.Name, v.Status)
	}
	return v.Metadata.Name, err
}

func (l *Lifecycle) discard(ctx context.Context, name string) error {
	_, err := l.d.Client.DeleteVolume(ctx, name)
	return err
}

// blank: durable create of a blank 512 MB volume, beside cp --reflink and the
// same flushes, and beside one synced 4 KiB write.
func (l *Lifecycle) blank(ctx context.Context) error {
	l.say("create of a blank volume, %d rounds", l.Rounds)
	y, err := newYardsticks(ctx, l.d.State)
	if err != nil {
		return err
	}
	defer y.close()
	var create, reflink, write, byHand samples
	warm, err := l.create(ctx, 512, "", "")
	if err != nil {
		return err
	}
	if err := l.discard(ctx, warm); err != nil {
		return err
	}
	for round := range l.Rounds {
		var name string
		if err := create.time(func() (err error) { name, err = l.create(ctx, 512, "", ""); return err }); err != nil {
			return err
		}
		if err := errors.Join(reflink.time(func() error { return y.reflink(ctx) }), write.time(y.write)); err != nil {
			return err
		}
		if round%20 == 0 {
			if err := byHand.time(func() error { return y.byHand(ctx) }); err != nil {
				return err
			}
		}
		if err := l.discard(ctx, name); err != nil {
			return err
		}
	}
	ratio := pairedRatio(create, reflink)
	l.report.Rows = append(l.report.Rows,
		Row{Measure: "durable create of a blank 512 MB volume", Unit: "ms", Samples: len(create), P50: milliseconds(create.median()), P99: milliseconds(create.quantile(0.99)),
			Goal: "p50 ≤ 5 ms and ≤ 3× the yardstick; p99 ≤ 15 ms", Met: create.median() <= 5*time.Millisecond && create.quantile(0.99) <= 15*time.Millisecond && ratio <= 3,
			Yardstick: "cp --reflink, fsync of file and directory", Beside: milliseconds(reflink.median()), Ratio: ratio},
		Row{Measure: "the same create", Unit: "ms", Samples: len(create), P50: milliseconds(create.median()),
			Yardstick: "one synced 4 KiB write in the pool", Beside: milliseconds(write.median()), Ratio: pairedRatio(create, write)},
		Row{Measure: "the same create", Unit: "ms", Samples: len(byHand), P50: milliseconds(create.median()),
			Yardstick: "truncate, mkfs.ext4, losetup, mount by hand", Beside: milliseconds(byHand.median()), Ratio: float64(create.median()) / float64(byHand.median())})
	return nil
}

// sized is a template of a tree of so many MiB, and creates from it.
type sized struct {
	name   string
	mib    int64
	files  int
	create samples
}

func (z *sized) volume() int64 { return z.mib + z.mib/4 + 64 }

// templates: create from a template is the same whatever its size. Both sizes are
// sampled in the same rounds.
func (l *Lifecycle) templates(ctx context.Context) error {
	small := &sized{name: "small", mib: 300, files: 15_000}
	if l.Quick {
		small.mib, small.files = 30, 1_500
	}
	all := []*sized{small}
	if !l.Quick {
		all = append(all, &sized{name: "large", mib: 5000, files: 2_000})
	}
	for _, z := range all {
		if err := l.push(ctx, z); err != nil {
			return err
		}
	}
	l.say("creates from the templates, %d rounds", l.Rounds)
	for range l.Rounds {
		for _, z := range all {
			if err := l.createFrom(ctx, z, &z.create); err != nil {
				return err
			}
		}
	}
	l.report.Rows = append(l.report.Rows, Row{Measure: fmt.Sprintf("durable create from a template of %d MB", small.mib), Unit: "ms", Samples: len(small.create),
		P50: milliseconds(small.create.median()), P99: milliseconds(small.create.quantile(0.99)), Goal: "p50 ≤ 5 ms", Met: small.create.median() <= 5*time.Millisecond})
	if !l.Quick {
		l.compareSizes(small, all[1])
	}
	return l.compareCopy(ctx, small)
}

func (l *Lifecycle) compareSizes(small, large *sized) {
	ratio := pairedRatio(large.create, small.create)
	l.report.Rows = append(l.report.Rows, Row{Measure: "durable create from a template of 5 GB", Unit: "ms", Samples: len(large.create),
		P50: milliseconds(large.create.median()), P99: milliseconds(large.create.quantile(0.99)),
		Goal: "p50 ≤ 5 ms, within 1.5× of 300 MB", Met: large.create.median() <= 5*time.Millisecond && ratio <= 1.5 && ratio >= 1/1.5,
		Yardstick: "create from a template of 300 MB", Beside: milliseconds(small.create.median()), Ratio: ratio})
}

// compareCopy copies the small tree as a user would.
func (l *Lifecycle) compareCopy(ctx context.Context, small *sized) error {
	tree := filepath.Join(l.Dir, "tree-small")
	if err := makeTree(tree, small.mib, small.files); err != nil {
		return err
	}
	var copies samples
	for range 3 {
		if err := copies.time(func() error { return copyTree(ctx, tree, filepath.Join(l.Dir, "copy")) }); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(l.Dir, "copy")); err != nil {
			return err
		}
	}
	share := float64(small.create.median()) / float64(copies.median())
	l.report.Rows = append(l.report.Rows, Row{Measure: fmt.Sprintf("the create from %d MB", small.mib), Unit: "ms", Samples: len(copies), P50: milliseconds(small.create.median()),
		Goal: "≤ 1 % of the yardstick", Met: share <= 0.01, Yardstick: "cp -r of the same tree and sync", Beside: milliseconds(copies.median()), Ratio: share})
	return os.RemoveAll(tree)
}

// push makes a template of a tree, lets its source be made, and waits until what
// that wrote is on the disk.
func (l *Lifecycle) push(ctx context.Context, z *sized) error {
	l.say("template of %d MB", z.mib)
	tree := filepath.Join(l.Dir, "tree-"+z.name)
	if err := makeTree(tree, z.mib, z.files); err != nil {
		return err
	}
	if err := push(ctx, l.d.Client, z.name, tree); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(tree), l.createFrom(ctx, z, &samples{})); err != nil {
		return err
	}
	return syncFilesystem(ctx, l.d.State)
}

// createFrom makes a volume of a template, and deletes it outside of the time.
func (l *Lifecycle) createFrom(ctx context.Context, z *sized, s *samples) error {
	var volume string
	if err := s.time(func() (err error) { volume, err = l.create(ctx, z.volume(), z.name, ""); return err }); err != nil {
		return err
	}
	return l.discard(ctx, volume)
}

// crowd: 1,000 creates by 32 clients.
func (l *Lifecycle) crowd(ctx context.Context) error {
	const clients = 32
	total := int64(l.scale(1000))
	l.say("%d creates by %d clients", total, clients)
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	start := time.Now()
	for range clients {
		wg.Go(func() {
			for i := next.Add(1); i <= total; i = next.Add(1) {
				v := client.Volume{Metadata: client.VolumeMetadata{Name: fmt.Sprintf("crowd-%04d", i)}, Spec: client.VolumeSpec{Size: 512}}
				if _, err := l.d.Client.CreateVolume(ctx, v, ""); err != nil {
					failed.Store(&err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	rate := float64(total) / time.Since(start).Seconds()
	l.report.Rows = append(l.report.Rows, Row{Measure: fmt.Sprintf("%d durable creates by %d clients", total, clients), Unit: "/s", Samples: int(total), P50: rate, Goal: "≥ 500/s", Met: rate >= 500})
	for i := int64(1); i <= total; i++ {
		if err := l.discard(ctx, fmt.Sprintf("crowd-%04d", i)); err != nil {
			return err
		}
	}
	return nil
}

// grow: 1 to 10 GiB while mounted (XFS).
func (l *Lifecycle) grow(ctx context.Context) error {
	rounds := min(l.Rounds, 20)
	l.say("grow of a mounted XFS volume, %d rounds", rounds)
	var s samples
	for round := range rounds {
		name, err := l.create(ctx, 1024, "", "xfs")
		if err != nil {
			return err
		}
		at := client.Target{Type: "host", Path: filepath.Join(l.d.State, "attach", fmt.Sprintf("grow-%d", round))}
		a, err := l.d.Client.Attach(ctx, name, client.Attachment{Holder: "sandbox:bench", Target: at})
		if err != nil {
			return err
		}
		size := int64(10 * 1024)
		err = s.time(func() error {
			v, err := l.d.Client.UpdateVolume(ctx, name, client.VolumeChange{SizeMiB: &size})
			if err == nil && v.State.Sizes != nil && v.State.Sizes.Pending != "" {
				err = fmt.Errorf("growth is pending: %s", v.State.Sizes.Pending)
			}
			return err
		})
		if _, detach := l.d.Client.Detach(ctx, name, a.ID); err != nil || detach != nil {
			return errors.Join(err, detach)
		}
		if err := l.discard(ctx, name); err != nil {
			return err
		}
	}
	l.report.Rows = append(l.report.Rows, Row{Measure: "grow 1 → 10 GiB mounted (XFS)", Unit: "ms", Samples: len(s), P50: milliseconds(s.median()), P99: milliseconds(s.quantile(0.99)),
		Goal: "≤ 30 ms", Met: s.median() <= 30*time.Millisecond})
	return nil
}

// betweenGrows is the time in which the daemon makes a cage anew: growths of
// detached volumes that follow each other faster wait for one.
const betweenGrows = 300 * time.Millisecond

// growDetached: 64 MiB to 1 GiB while nobody uses it (ext4: e2fsck and resize2fs).
func (l *Lifecycle) growDetached(ctx context.Context) error {
	rounds := min(l.Rounds, 20)
	l.say("grow of a detached ext4 volume, %d rounds", rounds)
	var s samples
	for range rounds {
		name, err := l.create(ctx, 64, "", "ext4")
		if err != nil {
			return err
		}
		time.Sleep(betweenGrows)
		size := int64(1024)
		err = s.time(func() error {
			_, err := l.d.Client.UpdateVolume(ctx, name, client.VolumeChange{SizeMiB: &size})
			return err
		})
		if err := errors.Join(err, l.discard(ctx, name)); err != nil {
			return err
		}
	}
	l.report.Rows = append(l.report.Rows, Row{Measure: "grow 64 MiB → 1 GiB detached (ext4, in a cage)", Unit: "ms", Samples: len(s), P50: milliseconds(s.median()), P99: milliseconds(s.quantile(0.99)),
		Goal: "≤ 30 ms", Met: s.median() <= 30*time.Millisecond})
	return nil
}

// seed writes records of volumes that have no images: what a listing reads.
func (l *Lifecycle) seed(ctx context.Context, state string, n int) error {
	l.say("seeding %d records", n)
	store, err := metadata.Open(filepath.Join(state, "meta", "store"), metadata.Options{
		Log: slog.New(slog.DiscardHandler), SequenceFile: filepath.Join(state, "sequence"),
	})
	if err != nil {
		return err
	}
	return errors.Join(engine.SeedRecords(ctx, store, "main", n, time.Now()), store.Close())
}

func (l *Lifecycle) listing(ctx context.Context) error {
	n := l.scale(100_000)
	for _, q := range []struct {
		name  string
		query client.VolumeQuery
		goal  time.Duration
	}{
		{"first page of 50", client.VolumeQuery{Limit: 50}, 5 * time.Millisecond},
		{"page of 50 with q that one volume matches", client.VolumeQuery{Limit: 50, Search: "seeded-000007"}, 50 * time.Millisecond},
		{"last page of 50", client.VolumeQuery{Limit: 50, Anchor: "end"}, 5 * time.Millisecond},
	} {
		var s samples
		for range l.Rounds {
			if err := s.time(func() error {
				p, err := l.d.Client.ListVolumes(ctx, q.query)
				if err == nil && (len(p.Data) == 0 || p.Meta.Total != n) {
					err = fmt.Errorf("%s: %d items of %d", q.name, len(p.Data), p.Meta.Total)
				}
				return err
			}); err != nil {
				return err
			}
		}
		l.report.Rows = append(l.report.Rows, Row{Measure: fmt.Sprintf("list among %d volumes: %s", n, q.name), Unit: "ms", Samples: len(s),
			P50: milliseconds(s.median()), P99: milliseconds(s.quantile(0.99)), Goal: fmt.Sprintf("≤ %d ms", q.goal.Milliseconds()), Met: s.median() <= q.goal})
	}
	return nil
}

// idle: memory and CPU of a daemon that has nothing to do.
func (l *Lifecycle) idle(ctx context.Context) error {
	n := l.scale(10_000)
	l.say("an idle daemon with %d volumes", n)
	c, err := l.idleCost(ctx, l.d)
	if err != nil {
		return err
	}
	l.report.Rows = append(l.report.Rows,
		Row{Measure: fmt.Sprintf("idle daemon with %d volumes: resident memory", n), Unit: "MiB", Samples: 1, P50: c.memory, Goal: "≤ 150 MB", Met: c.memory <= 143},
		Row{Measure: fmt.Sprintf("idle daemon with %d volumes: CPU", n), Unit: "% of a core", Samples: 1, P50: c.percent, Goal: "0 %", Met: c.percent < 0.5,
			Note: fmt.Sprintf("%d clock ticks in %d s", c.ticks, c.seconds)})
	return nil
}

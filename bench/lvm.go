package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/lvm"
	"holdfast/internal/guest"
	"holdfast/internal/guest/agent"
	"holdfast/internal/run"
)

// LVM measures what our backend adds to LVM: images made, cloned and removed in a
// thin pool, beside the plain commands on the same pool. It runs in a guest, because
// hosts that run benches may lack device mapper.
type LVM struct {
	Setting // Rounds: 0: 20; Quick: one: a smoke test of the bench itself

	pool   *lvm.Pool
	report Report
	serial int
}

const (
	// lvmImage is the size of each image: a few extents, as for any other size.
	lvmImage = 1 << 30
	lvmPool  = "vg/pool"
	// lvmGoal is what our backend may take, of the plain command's time.
	lvmGoal = 1.2
)

// Run starts a guest, has this program measure in it, and brings the report.
func (b *LVM) Run(ctx context.Context) (report Report, err error) {
	if b.Rounds == 0 {
		b.Rounds = 20
	}
	if b.Quick {
		b.Rounds = 1
	}
	host := hostFacts(b.Dir)
	g, err := guest.Open(ctx, guest.Options{Disks: []int64{16 << 30}})
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	disk, err := g.Disk(ctx, "disk0")
	if err != nil {
		return report, err
	}
	b.say("%d rounds in a guest", b.Rounds)
	program, err := os.Executable()
	if err != nil {
		return report, err
	}
	if err := sendProgram(ctx, g, program, "/tmp/holdfast"); err != nil {
		return report, err
	}
	var out bytes.Buffer
	command := agent.Command{Args: []string{"/tmp/holdfast", "bench", "lvm", "--inside", disk, "--rounds", strconv.Itoa(b.Rounds)}}
	if err := g.Command(ctx, command, nil, &out, b.Log); err != nil {
		return report, err
	}
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		return report, fmt.Errorf("the guest's report: %w", err)
	}
	inside := report.Host.Kernel
	report.Host = host
	report.Host.LoadAfter = load()
	report.Notes = append(report.Notes, "Inside a guest with kernel "+inside+" and emulated processors: an LVM command takes several times what it takes on a machine of its own.")
	return report, nil
}

// sendProgram puts a static program into a guest.
func sendProgram(ctx context.Context, g *guest.VM, program, to string) error {
	f, err := os.Open(program)
	if err != nil {
		return err
	}
	defer f.Close()
	return g.Command(ctx, agent.Command{Args: []string{"sh", "-c", "cat >" + to + " && chmod 755 " + to}}, f, nil, nil)
}

// Inside measures on a blank disk of the machine that it runs in.
func (b *LVM) Inside(ctx context.Context, disk string) (_ Report, err error) {
	b.report = Report{Name: "Thin volumes of LVM", Time: time.Now().UTC(), Host: hostFacts("/")}
	for _, args := range [][]string{
		{"vgcreate", "-qq", "vg", disk},
		{"lvcreate", "-qq", "-y", "-L", "12g", "--zero", "y", "-T", lvmPool},
	} {
		if err := command(ctx, args...); err != nil {
			return b.report, err
		}
	}
	if b.pool, err = lvm.Open(ctx, lvmPool, lvm.Options{Host: "bench"}); err != nil {
		return b.report, err
	}
	defer b.pool.Shutdown()
	return b.report, b.measure(ctx)
}

func command(ctx context.Context, args ...string) error {
	_, err := run.Run(ctx, run.Cmd{Args: args, Timeout: time.Minute})
	return err
}

// lvmTimes are the samples of all rounds.
type lvmTimes struct {
	create, clone, grow, open, remove, reclaimed samples
	make, publish                                samples // create, by its steps
	lvcreate, snapshot, lvextend, lvchange       samples
	lvremove                                     samples
}

func (b *LVM) measure(ctx context.Context) error {
	t := &lvmTimes{}
	source := b.next()
	if err := b.create(ctx, source, &lvmTimes{}); err != nil {
		return err
	}
	if err := command(ctx, "lvcreate", "-qq", "-y", "-an", "-V", fmt.Sprintf("%db", lvmImage), "-T", lvmPool, "-n", "source"); err != nil {
		return err
	}
	for n := range b.Rounds {
		b.say("round %d", n+1)
		if err := b.round(ctx, t, source, n%2 == 1); err != nil {
			return err
		}
	}
	b.tell(t)
	return nil
}

// next gives an ID for an image.
func (b *LVM) next() blockdev.ID {
	b.serial++
	return blockdev.ID(fmt.Sprintf("%s-%026d", blockdev.PrefixVolume, b.serial))
}

// round takes one sample of each; which of the two begins changes.
func (b *LVM) round(ctx context.Context, t *lvmTimes, source blockdev.ID, plainFirst bool) error {
	ours := func() error { return b.ours(ctx, t, source) }
	plain := func() error { return plain(ctx, t) }
	if plainFirst {
		return errors.Join(plain(), ours())
	}
	return errors.Join(ours(), plain())
}

func (b *LVM) create(ctx context.Context, id blockdev.ID, t *lvmTimes) error {
	return t.create.time(func() error {
		if err := t.make.time(func() error { return b.pool.Create(ctx, id, lvmImage) }); err != nil {
			return err
		}
		return t.publish.time(func() error { return b.pool.Publish(ctx, id, []byte(`{"what":"bench"}`)) })
	})
}

func (b *LVM) ours(ctx context.Context, t *lvmTimes, source blockdev.ID) error {
	// The plain commands are somebody else's changes: what we know is to be as true
	// again as it is on a host where we are alone.
	if _, err := b.pool.List(ctx); err != nil {
		return err
	}
	one, two := b.next(), b.next()
	if err := b.create(ctx, one, t); err != nil {
		return err
	}
	err := t.clone.time(func() error {
		if err := b.pool.Clone(ctx, two, source, lvmImage); err != nil {
			return err
		}
		return b.pool.Publish(ctx, two, []byte(`{"what":"bench"}`))
	})
	if err != nil {
		return err
	}
	var e blockdev.Endpoint
	err = t.open.time(func() (err error) {
		e, err = b.pool.Open(ctx, one, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
		return err
	})
	if err != nil {
		return err
	}
	if err := t.grow.time(func() error { return b.pool.Grow(ctx, one, 2*lvmImage) }); err != nil {
		return err
	}
	if err := b.pool.Close(ctx, one, e.Lease); err != nil {
		return err
	}
	start := time.Now()
	if err := t.remove.time(func() error { return b.pool.Remove(ctx, one) }); err != nil {
		return err
	}
	if err := b.settled(ctx); err != nil {
		return err
	}
	t.reclaimed = append(t.reclaimed, time.Since(start))
	return errors.Join(b.pool.Remove(ctx, two), b.settled(ctx))
}

// settled waits until what was removed has been reclaimed. It asks device mapper
// and the pool's own record, so that it takes no lock of LVM's.
func (b *LVM) settled(ctx context.Context) error {
	for {
		trash, err := b.pool.Reclaiming(ctx)
		if err != nil || trash == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// plain does the same with the commands that one would type.
func plain(ctx context.Context, t *lvmTimes) error {
	size := fmt.Sprintf("%db", lvmImage)
	for _, step := range []struct {
		to   *samples
		args []string
	}{
		{&t.lvcreate, []string{"lvcreate", "-qq", "-y", "-V", size, "-T", lvmPool, "-n", "one"}},
		{&t.snapshot, []string{"lvcreate", "-qq", "-y", "-s", "-n", "two", "vg/source"}},
		{nil, []string{"lvchange", "-qq", "-an", "vg/one"}},
		{&t.lvchange, []string{"lvchange", "-qq", "-ay", "vg/one"}},
		{&t.lvextend, []string{"lvextend", "-qq", "-L", fmt.Sprintf("%db", 2*lvmImage), "vg/one"}},
		{nil, []string{"lvchange", "-qq", "-an", "vg/one"}},
		{&t.lvremove, []string{"lvremove", "-qq", "-f", "vg/one"}},
		{nil, []string{"lvremove", "-qq", "-f", "vg/two"}},
	} {
		if step.to == nil {
			step.to = &samples{}
		}
		if err := step.to.time(func() error { return command(ctx, step.args...) }); err != nil {
			return err
		}
	}
	return nil
}

func (b *LVM) tell(t *lvmTimes) {
	row := func(what string, s samples, yardstick string, beside samples, note string, goal bool) {
		r := Row{Measure: what, Unit: "ms", Samples: len(s), P50: milliseconds(s.median()), P99: milliseconds(s.quantile(0.99)),
			Yardstick: yardstick, Beside: milliseconds(beside.median()), Ratio: pairedRatio(s, beside), Note: note}
		if goal {
			r.Goal, r.Met = fmt.Sprintf("≤ %.1f× the yardstick", lvmGoal), r.Ratio <= lvmGoal
		}
		b.report.Rows = append(b.report.Rows, r)
	}
	row("create, durable, described", t.create, "lvcreate -V -T (not flushed)", t.lvcreate,
		fmt.Sprintf("the draft %.0f ms, publishing it %.0f ms", milliseconds(t.make.median()), milliseconds(t.publish.median())), true)
	row("clone, durable, described", t.clone, "lvcreate -s (not flushed)", t.snapshot, "", true)
	row("remove, until the name is free", t.remove, "lvremove (not flushed)", t.lvremove, "", true)
	row("remove, until the space is given back", t.reclaimed, "lvremove (not flushed)", t.lvremove, "", false)
	row("grow, open", t.grow, "lvextend (not flushed)", t.lvextend, "", true)
	row("open: activate", t.open, "lvchange -ay", t.lvchange, "", true)
}

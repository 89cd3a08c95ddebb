package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/api/client"
	"holdfast/internal/localdaemon"
	"holdfast/internal/run"
)

// Attach measures attachments: how long attach and detach take with 1, 100 and
// 1,000 live ones on the host, and what these cost when nothing happens.
type Attach struct {
	Setting // Rounds: of each measure; 0: 60; Quick: at most 10 live ones: a smoke test of the bench itself

	d      *localdaemon.Daemon
	boxes  []*box
	live   atomic.Int64
	report Report
}

const (
	// attachBoxes are the containers that half of the live attachments are in.
	attachBoxes = 8
	// dirtyBytes are written before each detach that has something to flush.
	dirtyBytes = 4 << 20
)

// Run measures everything and cleans up; see Lifecycle.Run.
func (a *Attach) Run(ctx context.Context) (report Report, err error) {
	if a.Rounds == 0 {
		a.Rounds = 60
	}
	a.report = Report{Name: "Attachments", Time: time.Now().UTC(), Host: hostFacts(a.Dir)}
	defer func() {
		a.report.Host.LoadAfter = load()
		report = a.report
	}()
	runcRoot := filepath.Join(a.Dir, "runc")
	defer func() { err = errors.Join(err, a.removeBoxes(context.WithoutCancel(ctx))) }()
	boxes := attachBoxes
	if a.Quick {
		boxes = 2
	}
	for i := range boxes {
		b, err := startBox(ctx, a.Dir, runcRoot, fmt.Sprintf("bench-%d-%d", os.Getpid(), i))
		if err != nil {
			return a.report, err
		}
		a.boxes = append(a.boxes, b)
	}
	a.d, err = localdaemon.Start(ctx, a.Daemon, filepath.Join(a.Dir, "state"), "--pool-size", "8GiB", "--overprovision", overprovision, "--runc-root", runcRoot)
	if err != nil {
		return a.report, err
	}
	defer func() {
		err = errors.Join(err, a.detachAll(context.WithoutCancel(ctx)), a.d.Remove(context.WithoutCancel(ctx)))
	}()
	return a.report, a.measure(ctx)
}

func (a *Attach) measure(ctx context.Context) error {
	y, err := newYardsticks(ctx, a.d.State)
	if err != nil {
		return err
	}
	defer y.close()
	if err := a.probes(ctx); err != nil {
		return err
	}
	steps := []int{1, 100, 1000}
	if a.Quick {
		steps = []int{1, 4, 10}
	}
	var first *attachTimes
	for _, n := range steps {
		if err := a.fill(ctx, n-1); err != nil { // the one that is measured is the n-th
			return err
		}
		times, err := a.rounds(ctx, y, n)
		if err != nil {
			return err
		}
		if first == nil {
			first = times
		}
		a.tell(n, times, first)
	}
	if err := a.idle(ctx, steps[len(steps)-1]-1); err != nil {
		return err
	}
	return a.restart(ctx, steps[len(steps)-1]-1)
}

// probes makes the volumes that are attached and detached in the rounds.
func (a *Attach) probes(ctx context.Context) error {
	for _, name := range []string{"probe-host", "probe-runc"} {
		if err := a.create(ctx, name); err != nil {
			return err
		}
		at, err := a.d.Client.Attach(ctx, name, a.onHost(name))
		if err != nil {
			return err
		}
		err = os.WriteFile(filepath.Join(a.path(name), "first"), []byte("first byte\n"), 0o600)
		if _, detach := a.d.Client.Detach(ctx, name, at.ID); err != nil || detach != nil {
			return errors.Join(err, detach)
		}
	}
	return nil
}

func (a *Attach) create(ctx context.Context, name string) error {
	_, err := a.d.Client.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Size: 16}}, "")
	return err
}

func (a *Attach) path(volume string) string { return filepath.Join(a.d.State, "attach", volume) }

func (a *Attach) onHost(volume string) client.Attachment {
	return client.Attachment{Holder: "sandbox:" + volume, Target: client.Target{Type: "host", Path: a.path(volume)}}
}

func (a *Attach) inBox(b *box, volume string) client.Attachment {
	return client.Attachment{Holder: "sandbox:" + b.id, MountPath: "/volumes/" + volume, Target: client.Target{Type: "runc", Container: b.id}}
}

// fill brings the number of live attachments to n: real volumes, each with its own
// loop device and mounts, every other one in a container.
func (a *Attach) fill(ctx context.Context, n int) error {
	a.say("bringing the live attachments to %d", n)
	return a.each(int(a.live.Load()), n, func(i int) error {
		name := fmt.Sprintf("live-%04d", i)
		if err := a.create(ctx, name); err != nil {
			return err
		}
		at := a.onHost(name)
		if i%2 == 1 {
			at = a.inBox(a.boxes[i/2%len(a.boxes)], name)
		}
		_, err := a.d.Client.Attach(ctx, name, at)
		a.live.Add(1)
		return err
	})
}

// each runs do for from..to-1, eight at a time.
func (a *Attach) each(from, to int, do func(i int) error) error {
	var next atomic.Int64
	next.Store(int64(from))
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(to); i = next.Add(1) - 1 {
				if err := do(int(i)); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// attachTimes are the samples of one number of live attachments.
type attachTimes struct {
	hostAttach, hostDetach, runcAttach, runcDetach, dirtyDetach samples
	handMount, handUnmount, handDirty                           samples
}

func (a *Attach) rounds(ctx context.Context, y *yardsticks, n int) (*attachTimes, error) {
	a.say("attach and detach with %d live, %d rounds", n, a.Rounds)
	t := &attachTimes{}
	inside := a.boxes[0]
	for range a.Rounds {
		err := errors.Join(
			a.round(ctx, "probe-host", a.onHost("probe-host"), a.path("probe-host"), 0, &t.hostAttach, &t.hostDetach),
			a.round(ctx, "probe-runc", a.inBox(inside, "probe-runc"), inside.see("/volumes/probe-runc"), 0, &t.runcAttach, &t.runcDetach),
			a.round(ctx, "probe-host", a.onHost("probe-host"), a.path("probe-host"), dirtyBytes, &samples{}, &t.dirtyDetach),
			y.mountLoop(ctx, 0, &t.handMount, &t.handUnmount),
			y.mountLoop(ctx, dirtyBytes, &samples{}, &t.handDirty))
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

// round attaches, reads the first byte, writes what is to be flushed, and detaches.
func (a *Attach) round(ctx context.Context, volume string, at client.Attachment, dir string, dirty int, attach, detach *samples) error {
	var made client.Attachment
	err := attach.time(func() (err error) {
		if made, err = a.d.Client.Attach(ctx, volume, at); err != nil {
			return err
		}
		return firstByte(dir)
	})
	if err != nil {
		return err
	}
	if err := writeDirty(dir, dirty); err != nil {
		return err
	}
	return detach.time(func() error {
		_, err := a.d.Client.Detach(ctx, volume, made.ID)
		return err
	})
}

func firstByte(dir string) error {
	f, err := os.Open(filepath.Join(dir, "first"))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Read(make([]byte, 1))
	return err
}

func writeDirty(dir string, bytes int) error {
	if bytes == 0 {
		return nil
	}
	return os.WriteFile(filepath.Join(dir, "dirty"), make([]byte, bytes), 0o600)
}

func (a *Attach) tell(n int, t, first *attachTimes) {
	row := func(what string, s samples, goal time.Duration, base samples, yardstick string, beside, besideBase samples) {
		r := Row{Measure: fmt.Sprintf("%s, %d live", what, n), Unit: "ms", Samples: len(s), P50: milliseconds(s.median()), P99: milliseconds(s.quantile(0.99)),
			Goal: fmt.Sprintf("≤ %d ms", goal.Milliseconds()), Met: s.median() <= goal,
			Yardstick: yardstick, Beside: milliseconds(beside.median()), Ratio: pairedRatio(s, beside)}
		r.Note = fmt.Sprintf("the fastest tenth, which others' work disturbs least: %.1f ms; of the yardstick %.1f ms", milliseconds(s.quantile(0.1)), milliseconds(beside.quantile(0.1)))
		if t != first {
			r.Note += fmt.Sprintf("; that is %.2f times what it is with one, the yardstick %.2f times",
				float64(s.quantile(0.1))/float64(base.quantile(0.1)), float64(beside.quantile(0.1))/float64(besideBase.quantile(0.1)))
		}
		a.report.Rows = append(a.report.Rows, r)
	}
	row("attach to a host directory → first byte", t.hostAttach, 10*time.Millisecond, first.hostAttach, "mount -o loop by hand, first byte", t.handMount, first.handMount)
	row("detach from it", t.hostDetach, 20*time.Millisecond, first.hostDetach, "umount by hand", t.handUnmount, first.handUnmount)
	row("attach to a running container → first byte", t.runcAttach, 10*time.Millisecond, first.runcAttach, "mount -o loop by hand, on the host", t.handMount, first.handMount)
	row("detach from it", t.runcDetach, 20*time.Millisecond, first.runcDetach, "umount by hand", t.handUnmount, first.handUnmount)
	flush := t.dirtyDetach.median() - t.hostDetach.median()
	byHand := t.handDirty.median() - t.handUnmount.median()
	a.report.Rows = append(a.report.Rows, Row{Measure: fmt.Sprintf("detach with 4 MiB dirty, %d live", n), Unit: "ms", Samples: len(t.dirtyDetach),
		P50: milliseconds(t.dirtyDetach.median()), P99: milliseconds(t.dirtyDetach.quantile(0.99)),
		Yardstick: "umount by hand with 4 MiB dirty", Beside: milliseconds(t.handDirty.median()), Ratio: pairedRatio(t.dirtyDetach, t.handDirty),
		Note: fmt.Sprintf("of it, %.1f ms more than with nothing dirty; by hand %.1f ms more, which is in the page cache of the pool then and not durable", milliseconds(flush), milliseconds(byHand))})
}

// idle: what the live attachments cost when nothing happens.
func (a *Attach) idle(ctx context.Context, n int) error {
	a.say("an idle daemon with %d live attachments", n)
	c, err := a.idleCost(ctx, a.d)
	if err != nil {
		return err
	}
	a.report.Rows = append(a.report.Rows,
		Row{Measure: fmt.Sprintf("idle daemon with %d live attachments: CPU", n), Unit: "% of a core", Samples: 1, P50: c.percent, Goal: "≤ 1 %", Met: c.percent <= 1,
			Note: fmt.Sprintf("%d clock ticks in %d s", c.ticks, c.seconds)},
		Row{Measure: fmt.Sprintf("idle daemon with %d live attachments: resident memory", n), Unit: "MiB", Samples: 1, P50: c.memory})
	return nil
}

// restart: the daemon finds every attachment again and changes none.
func (a *Attach) restart(ctx context.Context, n int) error {
	a.say("a restart with %d live attachments", n)
	before, err := useOfLoops(a.d.State)
	if err != nil {
		return err
	}
	if err := a.d.Stop(); err != nil {
		return err
	}
	start := time.Now()
	if err := a.d.Restart(ctx); err != nil {
		return err
	}
	took := time.Since(start)
	after, err := useOfLoops(a.d.State)
	if err != nil {
		return err
	}
	changed := 0
	for device, sequence := range before {
		if after[device] != sequence {
			changed++
		}
	}
	attached, err := a.attached(ctx)
	a.report.Rows = append(a.report.Rows, Row{Measure: fmt.Sprintf("restart with %d live attachments, until ready", n), Unit: "ms", Samples: 1, P50: milliseconds(took),
		Goal: "all found again, none changed", Met: attached == n && changed == 0, Note: fmt.Sprintf("%d found attached, %d loop devices changed", attached, changed)})
	return err
}

func (a *Attach) attached(ctx context.Context) (n int, err error) {
	for v, err := range a.d.Client.Volumes(ctx, client.VolumeQuery{}) {
		if err != nil {
			return n, err
		}
		if v.State.AttachedTo != "" {
			n++
		}
	}
	return n, nil
}

// useOfLoops tells the kernel's number for the present use of each loop device
// whose file is below a directory.
func useOfLoops(dir string) (map[string]string, error) {
	devices, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	uses := map[string]string{}
	for _, file := range devices {
		if backing, err := os.ReadFile(file); err != nil || !strings.HasPrefix(string(backing), dir+"/") {
			continue // somebody else's, or gone meanwhile
		}
		device := filepath.Dir(filepath.Dir(file))
		sequence, err := os.ReadFile(filepath.Join(device, "diskseq"))
		if err != nil {
			return nil, err
		}
		uses[device] = string(sequence)
	}
	return uses, nil
}

func (a *Attach) detachAll(ctx context.Context) error {
	var names []string
	for v, err := range a.d.Client.Volumes(ctx, client.VolumeQuery{}) {
		if err != nil {
			return err
		}
		names = append(names, v.Metadata.Name)
	}
	return a.each(0, len(names), func(i int) error {
		all, err := a.d.Client.Attachments(ctx, names[i])
		for _, at := range all {
			_, detach := a.d.Client.Detach(ctx, names[i], at.ID)
			err = errors.Join(err, detach)
		}
		return err
	})
}

func (a *Attach) removeBoxes(ctx context.Context) error {
	var errs []error
	for _, b := range a.boxes {
		_, err := run.Run(ctx, run.Cmd{Args: []string{"runc", "--root", b.root, "delete", "--force", b.id}})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"holdfast/api/client"
	"holdfast/internal/localdaemon"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// Templates measures templates: from an upload to READY, creates from templates of
// very different sizes, and what many revisions occupy.
type Templates struct {
	Setting // Rounds: of the creates; 0: 100. Of the uploads a twentieth; Quick: small trees: a smoke test of the bench itself

	d      *localdaemon.Daemon
	report Report
}

// shape is a tree and the template that is made of it.
type shape struct {
	name   string
	mib    int64
	files  int
	sparse int64 // MiB of one more file, nearly all of it a hole
}

// Run measures everything and cleans up; see Lifecycle.Run.
func (b *Templates) Run(ctx context.Context) (report Report, err error) {
	if b.Rounds == 0 {
		b.Rounds = 100
	}
	b.report = Report{Name: "Templates", Time: time.Now().UTC(), Host: hostFacts(b.Dir)}
	defer func() {
		b.report.Host.LoadAfter = load()
		report = b.report
	}()
	b.d, err = localdaemon.Start(ctx, b.Daemon, filepath.Join(b.Dir, "state"), "--pool-size", b.pick("24GiB", "4GiB"), "--overprovision", overprovision)
	if err != nil {
		return b.report, err
	}
	defer func() { err = errors.Join(err, b.d.Remove(context.WithoutCancel(ctx))) }()
	for _, measure := range []func(context.Context) error{b.uploads, b.generations, b.creates} {
		if err := measure(ctx); err != nil {
			return b.report, err
		}
	}
	return b.report, nil
}

func (b *Templates) pick(full, quick string) string {
	if b.Quick {
		return quick
	}
	return full
}

func (b *Templates) scale(n int64) int64 {
	if b.Quick {
		return max(1, n/10)
	}
	return n
}

// pack makes a tree and an archive of it, and removes the tree.
func (b *Templates) pack(ctx context.Context, s shape, args ...string) (archive string, err error) {
	tree := filepath.Join(b.Dir, "tree-"+s.name)
	if err := makeTree(tree, s.mib, s.files); err != nil {
		return "", err
	}
	if s.sparse > 0 {
		if err := sparseFile(filepath.Join(tree, "sparse"), s.sparse<<20); err != nil {
			return "", err
		}
	}
	archive, err = b.tar(ctx, tree, args...)
	return archive, errors.Join(err, os.RemoveAll(tree))
}

// tar packs a directory beside it.
func (b *Templates) tar(ctx context.Context, tree string, args ...string) (string, error) {
	archive := tree + ".tar"
	_, err := run.Run(ctx, run.Cmd{Args: append([]string{"tar", "-C", tree, "-S", "-cf", archive}, append(args, ".")...), Timeout: time.Hour})
	return archive, err
}

// sparseFile makes a file that has a block in each 64 MiB.
func sparseFile(path string, size int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for at := int64(0); at < size; at += 64 << 20 {
		if _, err := f.WriteAt([]byte("data"), at); err != nil {
			return err
		}
	}
	return f.Truncate(size)
}

// send uploads an archive and returns when the version is READY.
func (b *Templates) send(ctx context.Context, name, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	_, err = b.d.Client.PushTemplate(ctx, client.Push{Name: name, Archive: f, Length: info.Size()})
	return err
}

func (b *Templates) drop(ctx context.Context, name string) error {
	_, err := b.d.Client.DeleteTemplate(ctx, name)
	return err
}

// byHand unpacks an archive and makes an image of what came out, as a user would,
// on the pool's file system; nothing is flushed.
func (b *Templates) byHand(ctx context.Context, archive string, mebibytes int64) error {
	dir := filepath.Join(b.d.State, "pool", "bench-by-hand")
	tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "image")
	if err := os.MkdirAll(tree, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"tar", "-x", "-S", "-C", tree, "-f", archive},
		{"mkfs.ext4", "-q", "-d", tree, image, fmt.Sprintf("%dm", mebibytes)},
	} {
		if _, err := run.Run(ctx, run.Cmd{Args: args, Timeout: time.Hour}); err != nil {
			return err
		}
	}
	return nil
}

func (b *Templates) clearByHand(ctx context.Context) error {
	return errors.Join(os.RemoveAll(filepath.Join(b.d.State, "pool", "bench-by-hand")), syncFilesystem(ctx, b.d.State))
}

// uploads: from the first byte of an upload to READY, beside tar and mkfs. Each
// template is deleted after its round, so that none finds another's image.
func (b *Templates) uploads(ctx context.Context) error {
	s := shape{name: "app", mib: b.scale(300), files: int(b.scale(15_000))}
	sorted, err := b.pack(ctx, s, "--sort=name")
	if err != nil {
		return err
	}
	s.name = "found"
	found, err := b.pack(ctx, s)
	if err != nil {
		return err
	}
	rounds := max(3, b.Rounds/20)
	b.say("uploads of %d MB in %d files, %d rounds", s.mib, s.files, rounds)
	var ours, unsorted, again, hand samples
	for range rounds {
		for _, step := range []struct {
			to   *samples
			what func() error
		}{
			{&ours, func() error { return b.send(ctx, "app", sorted) }},
			{&again, func() error { return b.send(ctx, "app-again", sorted) }},
			{nil, func() error {
				return errors.Join(b.drop(ctx, "app"), b.drop(ctx, "app-again"), syncFilesystem(ctx, b.d.State))
			}},
			{&unsorted, func() error { return b.send(ctx, "app", found) }},
			{nil, func() error { return errors.Join(b.drop(ctx, "app"), syncFilesystem(ctx, b.d.State)) }},
			{&hand, func() error { return b.byHand(ctx, sorted, s.mib*3/2+64) }},
			{nil, func() error { return b.clearByHand(ctx) }},
		} {
			if step.to == nil {
				step.to = &samples{}
			}
			if err := step.to.time(step.what); err != nil {
				return err
			}
		}
	}
	row := func(what string, s samples, goal string) {
		ratio := pairedRatio(s, hand)
		b.report.Rows = append(b.report.Rows, Row{Measure: what, Unit: "ms", Samples: len(s), P50: milliseconds(s.median()), Goal: goal, Met: ratio <= 1.2,
			Yardstick: "tar x and mkfs.ext4 -d, not flushed", Beside: milliseconds(hand.median()), Ratio: ratio})
	}
	row(fmt.Sprintf("upload → READY, durable: %d MB in %d files, archive in order", s.mib, s.files), ours, "≤ 1.2× the yardstick")
	row("the same, archive as tar finds the files", unsorted, "≤ 1.2× the yardstick")
	row("the same archive again, to another template", again, "")
	return errors.Join(os.Remove(sorted), os.Remove(found))
}

// generations: ten revisions, each with a hundredth of the files changed.
func (b *Templates) generations(ctx context.Context) error {
	const revisions = 10
	s := shape{name: "line", mib: b.scale(2000), files: int(b.scale(20_000))}
	b.say("%d revisions of %d MB", revisions, s.mib)
	tree := filepath.Join(b.Dir, "tree-"+s.name)
	if err := makeTree(tree, s.mib, s.files); err != nil {
		return err
	}
	empty, err := b.occupied(ctx)
	if err != nil {
		return err
	}
	var one, ten int64
	for n := range revisions {
		if n > 0 {
			if err := changeTree(tree, n); err != nil {
				return err
			}
		}
		archive, err := b.tar(ctx, tree)
		if err != nil {
			return err
		}
		if err := errors.Join(b.send(ctx, s.name, archive), os.Remove(archive)); err != nil {
			return err
		}
		if ten, err = b.occupied(ctx); err != nil {
			return err
		}
		if n == 0 {
			one = ten
		}
		b.say("  %d: %d MiB", n+1, (ten-empty)>>20)
	}
	ratio := float64(ten-empty) / float64(one-empty)
	b.report.Rows = append(b.report.Rows, Row{Measure: fmt.Sprintf("%d revisions of %d MB in %d files, 1 %% of them changed each time", revisions, s.mib, s.files), Unit: "MiB", Samples: 1,
		P50: float64((ten - empty) >> 20), Goal: "≤ 1.3× one", Met: ratio <= 1.3, Yardstick: "one revision", Beside: float64((one - empty) >> 20), Ratio: ratio})
	var first, create samples
	if err := b.create(ctx, s, &first); err != nil { // makes the source
		return err
	}
	for range max(3, b.Rounds/10) {
		if err := b.create(ctx, s, &create); err != nil {
			return err
		}
	}
	b.report.Rows = append(b.report.Rows, Row{Measure: "the first create from the last of them", Unit: "ms", Samples: 1, P50: milliseconds(first.median())},
		Row{Measure: "each later one", Unit: "ms", Samples: len(create), P50: milliseconds(create.median()), P99: milliseconds(create.quantile(0.99))})
	return errors.Join(os.RemoveAll(tree), b.drop(ctx, s.name))
}

// changeTree writes a hundredth of the files of a tree anew, others each time.
func changeTree(tree string, n int) error {
	paths, err := filepath.Glob(filepath.Join(tree, "*", "*"))
	if err != nil {
		return err
	}
	slices.Sort(paths)
	for i := n * 7 % 100; i < len(paths); i += 100 {
		b, err := os.ReadFile(paths[i])
		if err != nil {
			return err
		}
		for k := range b {
			b[k] ^= byte(n + k)
		}
		if err := os.WriteFile(paths[i], b, 0o644); err != nil { //nolint:gosec // as the tree has them
			return err
		}
	}
	return nil
}

// occupied is what of the pool's file system is in use once it has settled: what
// was deleted is given back in the background.
func (b *Templates) occupied(ctx context.Context) (int64, error) {
	least, still := int64(-1), 0
	for still < 10 {
		if err := syncFilesystem(ctx, filepath.Join(b.d.State, "pool")); err != nil {
			return 0, err
		}
		at, err := sys.SpaceOf(filepath.Join(b.d.State, "pool"))
		if err != nil {
			return 0, err
		}
		if used := at.Total - at.Free; least < 0 || used < least {
			least, still = used, 0
		}
		still++
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return least, nil
}

// create makes a volume of a template, and deletes it outside of the time.
func (b *Templates) create(ctx context.Context, s shape, to *samples) error {
	var name string
	size := s.mib + s.mib/4 + s.sparse + 64
	err := to.time(func() error {
		v, err := b.d.Client.CreateVolume(ctx, client.Volume{Spec: client.VolumeSpec{Size: size, Template: s.name}}, "")
		if err == nil && v.Status != "DEPLOYED" {
			err = fmt.Errorf("volume %s is %s", v.Metadata.Name, v.Status)
		}
		name = v.Metadata.Name
		return err
	})
	if err != nil {
		return err
	}
	_, err = b.d.Client.DeleteVolume(ctx, name)
	return err
}

// creates: a create takes the same time whatever the template's size.
func (b *Templates) creates(ctx context.Context) error {
	all := []shape{
		{name: "small", mib: b.scale(300), files: int(b.scale(15_000))},
		{name: "large", mib: b.scale(5000), files: 2000},
		{name: "sparse", mib: 100, files: 500, sparse: b.scale(50_000)},
	}
	times := make([]samples, len(all))
	for _, s := range all {
		b.say("template %s of %d MB", s.name, s.mib+s.sparse)
		archive, err := b.pack(ctx, s)
		if err != nil {
			return err
		}
		if err := errors.Join(b.send(ctx, s.name, archive), os.Remove(archive)); err != nil {
			return err
		}
		if err := b.create(ctx, s, &samples{}); err != nil { // makes the source
			return err
		}
	}
	if err := syncFilesystem(ctx, filepath.Join(b.d.State, "pool")); err != nil {
		return err
	}
	b.say("creates, %d rounds", b.Rounds)
	for range b.Rounds {
		for i, s := range all {
			if err := b.create(ctx, s, &times[i]); err != nil {
				return err
			}
		}
	}
	for i, s := range all {
		ratio := pairedRatio(times[i], times[0])
		what := fmt.Sprintf("durable create from a template of %d MB", s.mib+s.sparse)
		if s.sparse > 0 {
			what += " (sparse)"
		}
		row := Row{Measure: what, Unit: "ms", Samples: len(times[i]), P50: milliseconds(times[i].median()), P99: milliseconds(times[i].quantile(0.99)),
			Goal: "p50 ≤ 5 ms", Met: times[i].median() <= 5*time.Millisecond}
		if i > 0 {
			row.Goal += ", within 1.5× of the first"
			row.Met = row.Met && ratio <= 1.5 && ratio >= 1/1.5
			row.Yardstick, row.Beside, row.Ratio = "create from the first", milliseconds(times[0].median()), ratio
		}
		b.report.Rows = append(b.report.Rows, row)
	}
	return nil
}

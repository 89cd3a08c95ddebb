package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/overlay"
)

// store is where a base far away is, on this host.
type store struct {
	url    string
	chunks overlay.Chunks
	fetch  overlay.Fetch
}

// starter starts workers as the daemon does, and gives what ends with the bench.
func (o *Overlay) starter() (*control.Starter, func() error, error) {
	blockd := o.Blockd
	if blockd == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, nil, err
		}
		blockd = filepath.Join(filepath.Dir(self), "holdfast-blockd")
	}
	dir, err := os.MkdirTemp("", "hfb-") // sockets want short names
	if err != nil {
		return nil, nil, err
	}
	log, err := os.Create(filepath.Join(o.Dir, "worker.log"))
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	drop := func() error { return errors.Join(log.Close(), os.RemoveAll(dir)) }
	s, err := control.New(control.Options{Program: blockd, Dir: dir, Log: log, DieWithParent: true})
	if err != nil {
		return nil, nil, errors.Join(err, drop())
	}
	return s, drop, nil
}

// serveLayer has a volume of one new layer served, as spec says, while use runs.
func (o *Overlay) serveLayer(ctx context.Context, name string, spec control.Spec, use func(*control.Worker) error) (err error) {
	s, drop, err := o.starter()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, drop()) }()
	files, gone, err := o.layer(name)
	if err != nil {
		return err
	}
	defer gone()
	spec.ID, spec.Kind, spec.Size, spec.Layers = benchID, blockdev.VhostUser, o.size(), []control.Layer{handed(files)}
	w, err := s.Serve(ctx, spec)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Stop(context.WithoutCancel(ctx))) }()
	return use(w)
}

// handed are a layer's files as a worker is handed them.
func handed(f overlay.Files) control.Layer {
	return control.Layer{Data: f.Data.(overlay.OSFile).File, Map: f.Map.(overlay.OSFile).File} //nolint:forcetypeassert // layer has made them so
}

// far is a spec of a volume over the store.
func (o *Overlay) far(s store, hydrate bool) (control.Spec, func(), error) {
	f, err := o.file("chunks", os.O_TRUNC)
	if err != nil {
		return control.Spec{}, nil, err
	}
	drop := func() { _ = f.Close() } // the worker has its own
	if err := overlay.WriteChunks(f, s.chunks); err != nil {
		drop()
		return control.Spec{}, nil, err
	}
	return control.Spec{Remote: &control.Remote{URL: s.url, Chunks: f}, Hydrate: hydrate}, drop, nil
}

// servedHydration measures what a worker that nobody asks for anything takes to fetch
// all of its base.
func (o *Overlay) servedHydration(ctx context.Context, s store, round int, took *samples) error {
	spec, drop, err := o.far(s, true)
	if err != nil {
		return err
	}
	defer drop()
	return took.time(func() error {
		return o.serveLayer(ctx, fmt.Sprintf("served-%d", round), spec, func(w *control.Worker) error { return o.whole(ctx, w) })
	})
}

// whole waits until the top layer holds all.
func (o *Overlay) whole(ctx context.Context, w *control.Worker) error {
	for {
		status, err := w.Status(ctx)
		if err != nil {
			return err
		}
		if status.Layers == nil || status.Layers.Held >= o.size() {
			return nil
		}
		if status.Failed != "" {
			return fmt.Errorf("%w: %s", blockdev.ErrFailed, status.Failed)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// servedMisses measures 4 KiB reads that a guest makes of blocks that nobody has
// asked for, beside the store's own time for their chunks, in turns, and another of each
// chunk once the worker has it, which is the way without the store; while the worker
// fetches the rest at its rate for volumes in use, or not.
func (o *Overlay) servedMisses(ctx context.Context, s store, hydrate bool) error {
	spec, drop, err := o.far(s, hydrate)
	if err != nil {
		return err
	}
	defer drop()
	var ours, beside, again []uint32
	chunk := make([]byte, farChunk)
	measure, name := "4 KiB read by a guest that nobody has asked for, p99", "served-misses"
	if hydrate {
		measure, name = "the same while the worker hydrates at 32 MiB/s, p99", "served-both"
	}
	err = o.serveLayer(ctx, name, spec, func(w *control.Worker) (err error) {
		l, err := newVhostLoad(w.Socket(), ioJob{name: "misses", reads: 100, random: true, once: true, block: overlayBlock, depth: 1})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, l.f.Close()) }()
		defer context.AfterFunc(ctx, l.q.Abandon)()
		// A step of a chunk and more: each read is of another chunk than those before it.
		l.stride = coprime(l.blocks/(farChunk/overlayBlock)) * (farChunk / overlayBlock)
		for range 2 * o.batch() {
			missed := l.next
			if _, err := l.run(0); err != nil {
				return err
			}
			next := l.next
			l.next = missed ^ 1 // its neighbour
			if _, err := l.run(0); err != nil {
				return err
			}
			l.next = next
			start := time.Now()
			if err := s.fetch(ctx, chunk, o.order.Int64N(o.size()/farChunk)*farChunk); err != nil {
				return err
			}
			beside = append(beside, uint32(time.Since(start)))
		}
		for n, took := range l.took {
			if n%2 == 0 {
				ours = append(ours, took)
			} else {
				again = append(again, took)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, s := range [][]uint32{ours, beside, again} {
		slices.Sort(s)
	}
	mine, theirs := quantileOf(ours, 0.99)/1e6, quantileOf(beside, 0.99)/1e6
	row := Row{
		Measure: measure, Unit: "ms", Samples: len(ours), P50: mine,
		Yardstick: "the store's p99 for a chunk of 64 KiB", Beside: theirs, Ratio: mine / theirs,
		Note: fmt.Sprintf("medians %.2f and %.2f ms; %.1f %% and %.1f %% took more than 1 ms; another block of the chunk, which the worker has by then: median %.2f ms, p99 %.2f ms, %.1f %%",
			quantileOf(ours, 0.5)/1e6, quantileOf(beside, 0.5)/1e6, slower(ours), slower(beside), quantileOf(again, 0.5)/1e6, quantileOf(again, 0.99)/1e6, slower(again)),
	}
	if !hydrate {
		row.Goal, row.Met = "≤ 2× the yardstick", mine <= 2*theirs
	}
	o.report.Rows = append(o.report.Rows, row)
	return nil
}

// slower is how many percent of sorted times are above a millisecond: somebody else had
// the processor.
func slower(sorted []uint32) float64 {
	n, _ := slices.BinarySearch(sorted, uint32(time.Millisecond)+1)
	return 100 * float64(len(sorted)-n) / float64(len(sorted))
}

// servedStalls measures what a guest's writer feels of snapshots that its worker
// makes.
func (o *Overlay) servedStalls(ctx context.Context) error {
	o.say("a guest's writer under snapshots")
	job := ioJob{name: "writer", random: true, block: overlayBlock, depth: 1}
	each := 3 * time.Second
	if o.Quick {
		each = 200 * time.Millisecond
	}
	var still, under ioSample
	var held samples
	spec := control.Spec{Base: o.base, BaseSize: o.size()}
	err := o.serveLayer(ctx, "served-stalls", spec, func(w *control.Worker) (err error) {
		if still, _, err = loadVhost(ctx, w.Socket(), job, each); err != nil {
			return err
		}
		sealing, stop := context.WithCancel(ctx)
		defer stop()
		sealed := make(chan error, 1)
		go func() { sealed <- o.sealServed(sealing, w, &held) }()
		under, _, err = loadVhost(ctx, w.Socket(), job, each)
		stop()
		return errors.Join(err, <-sealed)
	})
	if err != nil {
		return err
	}
	o.report.Rows = append(o.report.Rows, Row{
		Measure: "4 KiB write by a guest while its worker makes and merges a snapshot each 50 ms, p99.9", Unit: "ms", Samples: len(held), P50: under.p999 / 1000,
		Goal: "≤ 10 ms", Met: under.p999 <= 10_000, Yardstick: "the same without snapshots, p99.9", Beside: still.p999 / 1000, Ratio: under.p999 / still.p999,
		Note: fmt.Sprintf("%d snapshots, which held requests for %.2f ms (median) and %.2f ms (the longest)", len(held), milliseconds(held.median()), milliseconds(held.quantile(1))),
	})
	return nil
}

// sealServed makes and merges snapshots until ctx ends; at least one.
func (o *Overlay) sealServed(ctx context.Context, w *control.Worker, held *samples) error {
	whole := context.WithoutCancel(ctx) // what has begun is finished
	for n := 0; ; n++ {
		next, _, err := o.layer(fmt.Sprintf("served-sealed-%d", n)) // its files stay: layers above need what is below
		if err != nil {
			return err
		}
		took, err := w.Seal(whole, handed(next), func() error { return o.record(n) })
		if err != nil {
			return err
		}
		*held = append(*held, took)
		if _, err := w.Merge(whole, control.Merge{}, func() error { return o.record(n) }); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
}

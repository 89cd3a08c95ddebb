package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"holdfast/blockdev/serve/overlay"
)

// farAway measures hydration from a store on this host by HTTP.
func (o *Overlay) farAway(ctx context.Context) error {
	o.say("hydration over HTTP")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	// The store is not what is measured: the kernel sends the file, from its memory.
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f, err := os.Open(o.base.Name())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer f.Close()
		http.ServeContent(w, r, "image", time.Time{}, f)
	}), ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }() // until it is closed
	defer func() { _ = server.Close() }()      // it was only read from
	url := "http://" + listener.Addr().String() + "/"
	fetch := overlay.HTTPFetch(overlay.StoreClient(nil, nil, nil), url)
	chunks, err := overlay.Digest(overlay.NewImage(o.base, o.size()), farChunk)
	if err != nil {
		return err
	}
	here := store{url, chunks, fetch}
	return errors.Join(o.hydrations(ctx, here), o.misses(ctx, chunks, fetch), o.servedMisses(ctx, here, false), o.servedMisses(ctx, here, true))
}

// hydrations measures hydration here and by a worker, in turns with its parts: what the
// store gives to who asks for the same ranges, as many at once, and looks at nothing,
// and what the disk takes of as many writes, durably.
func (o *Overlay) hydrations(ctx context.Context, s store) error {
	var alone, written, here, served samples
	for round := range min(o.Rounds, 5) {
		err := errors.Join(
			alone.time(func() error { return o.inFlights(func(p []byte, off int64) error { return s.fetch(ctx, p, off) }) }),
			o.writeAll(&written),
			o.remote(fmt.Sprintf("far-%d", round), s.chunks, s.fetch, func(v *overlay.Overlay) error {
				return here.time(func() error { return overlay.NewHydrator(v, nil, nil).Run(ctx) })
			}),
			o.servedHydration(ctx, s, round, &served))
		if err != nil {
			return err
		}
	}
	rate := func(s samples) float64 { return float64(o.size()) / (1 << 20) / s.median().Seconds() }
	for _, m := range []struct {
		name string
		took samples
	}{
		{"hydration from a store on this host by HTTP, verified, durable", here},
		{"hydration by a worker from a store on this host by HTTP, its start and its end included", served},
	} {
		o.report.Rows = append(o.report.Rows, Row{
			Measure: m.name, Unit: "MiB/s", Samples: len(m.took), P50: rate(m.took), Goal: "≥ 300 MiB/s", Met: rate(m.took) >= 300,
			Yardstick: "writing as much to a plain sparse file, durably", Beside: rate(written), Ratio: pairedRatio(written, m.took),
			Note: fmt.Sprintf("the store alone gives %.0f MiB/s: the same ranges, neither verified nor written", rate(alone)),
		})
	}
	return nil
}

// inFlights does something with each range of 1 MiB, four at once as hydration does.
func (o *Overlay) inFlights(one func(p []byte, off int64) error) error {
	const flights, each = 4, 1 << 20
	var all sync.WaitGroup
	var next atomic.Int64
	failed := make(chan error, flights)
	for range flights {
		all.Go(func() {
			p := direct(each)
			var err error
			for off := next.Add(each) - each; off < o.size() && err == nil; off = next.Add(each) - each {
				err = one(p, off)
			}
			failed <- err
		})
	}
	all.Wait()
	close(failed)
	var err error
	for one := range failed {
		err = errors.Join(err, one)
	}
	return err
}

// writeAll writes as much as hydration does.
func (o *Overlay) writeAll(took *samples) error {
	f, err := o.file("written", syscall.O_DIRECT)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(o.size()), took.time(func() error {
		err := o.inFlights(func(p []byte, off int64) error { _, err := f.WriteAt(p, off); return err })
		return errors.Join(err, f.Sync())
	}))
	return errors.Join(err, f.Close(), os.Remove(f.Name()))
}

// misses compares a 4 KiB read that nobody has asked for with the store's own time for its chunk.
func (o *Overlay) misses(ctx context.Context, chunks overlay.Chunks, fetch overlay.Fetch) error {
	var ours, beside samples
	p, chunk := direct(overlayBlock), make([]byte, farChunk)
	var fetched atomic.Int64
	counted := func(ctx context.Context, p []byte, off int64) error { fetched.Add(1); return fetch(ctx, p, off) }
	err := o.remote("missing", chunks, counted, func(v *overlay.Overlay) error {
		for _, at := range o.places(2 * o.batch()) {
			before := fetched.Load()
			var one samples
			if err := one.time(func() error { _, err := v.ReadAt(p, at); return err }); err != nil {
				return err
			}
			if fetched.Load() == before { // a neighbour's chunk
				continue
			}
			ours = append(ours, one...)
			if err := beside.time(func() error { return fetch(ctx, chunk, at/farChunk*farChunk) }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	atP99 := float64(ours.quantile(0.99)) / float64(beside.quantile(0.99))
	o.report.Rows = append(o.report.Rows, Row{
		Measure: "4 KiB read that nobody has asked for, p99", Unit: "ms", Samples: len(ours), P50: milliseconds(ours.quantile(0.99)),
		Goal: "≤ 2× the yardstick", Met: atP99 <= 2, Yardstick: "the store's p99 for the chunk of 64 KiB that it is in", Beside: milliseconds(beside.quantile(0.99)), Ratio: atP99,
	})
	return nil
}

// remote gives a volume over a store that is far away.
func (o *Overlay) remote(name string, chunks overlay.Chunks, fetch overlay.Fetch, use func(*overlay.Overlay) error) error {
	source, err := overlay.NewRemote(chunks, fetch, overlay.RemoteOptions{})
	if err != nil {
		return err
	}
	defer source.Close()
	f, gone, err := o.layer(name)
	if err != nil {
		return err
	}
	defer gone()
	v, err := overlay.Open([]overlay.Files{f}, source)
	if err != nil {
		return err
	}
	return use(v)
}

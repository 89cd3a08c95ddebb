package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
)

func (a *app) volumeTop() *cobra.Command {
	var once bool
	var every time.Duration
	var most int
	c := &cobra.Command{
		Use: "top", Short: "Show what goes through the volumes that are attached, the busiest first", Args: cobra.NoArgs,
		Long: "Show what goes through the volumes that are attached, the busiest first, until it is interrupted.\n" +
			"Latencies, what is inside and what is waited for are known of volumes that a worker serves; of others\n" +
			"the kernel or the virtual machine counts requests and bytes.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every < 100*time.Millisecond {
				return usageError{"--every must be at least 100ms"}
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			return a.top(cmd.Context(), cl, every, most, once)
		},
	}
	c.Flags().BoolVar(&once, "once", false, "show one span of time and end")
	c.Flags().DurationVar(&every, "every", 2*time.Second, "span of time that rates are of")
	c.Flags().IntVarP(&most, "most", "n", 30, "volumes to show")
	return c
}

func (a *app) top(ctx context.Context, cl *client.Client, every time.Duration, most int, once bool) error {
	before, err := takeIO(ctx, cl)
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
		now, err := takeIO(ctx, cl)
		if err != nil {
			return err
		}
		lines := ratesOf(before, now)
		if len(lines) > most {
			lines = lines[:most]
		}
		if !once && a.output == formatTable && isTerminal(a.out) {
			fmt.Fprint(a.out, "\x1b[H\x1b[2J") // home, and clear
		}
		if err := a.show(lines, func(r *rows) { topRows(r, lines) }); err != nil || once {
			return err
		}
		before = now
	}
}

// ioTaken is what was counted at one time.
type ioTaken struct {
	at      time.Time
	volumes map[string]client.VolumeIO
}

func takeIO(ctx context.Context, cl *client.Client) (ioTaken, error) {
	all, _, err := cl.IOInUse(ctx)
	t := ioTaken{time.Now(), map[string]client.VolumeIO{}}
	for _, v := range all {
		t.volumes[v.Name] = v
	}
	return t, err
}

// ioRate is what went through a volume in a span of time, per second.
type ioRate struct {
	Volume     string  `json:"volume"`
	Path       string  `json:"path"` // vhost-user, nbd; "direct": past every worker
	Reads      float64 `json:"reads"`
	ReadBytes  float64 `json:"readBytes"`
	Writes     float64 `json:"writes"`
	WriteBytes float64 `json:"writeBytes"`
	Flushes    float64 `json:"flushes"`
	Busy       float64 `json:"busy"`   // mean number of requests inside; -1: not known
	ReadP99    float64 `json:"p99"`    // µs, of reads since the worker began; -1: not known
	Waits      string  `json:"waits"`  // what most of the waiting was for; "" for nothing
	Absent     int64   `json:"absent"` // bytes that its top layer does not hold
}

// ratesOf gives the volumes that are there both times, the busiest first.
func ratesOf(before, now ioTaken) []ioRate {
	span := now.at.Sub(before.at).Seconds()
	lines := []ioRate{}
	for name, v := range now.volumes {
		if was, ok := before.volumes[name]; ok && span > 0 {
			lines = append(lines, rateOf(was, v, span))
		}
	}
	slices.SortFunc(lines, func(x, y ioRate) int {
		return cmp.Or(cmp.Compare(y.Reads+y.Writes, x.Reads+x.Writes), strings.Compare(x.Volume, y.Volume))
	})
	return lines
}

func rateOf(was, v client.VolumeIO, span float64) ioRate {
	l := ioRate{Volume: v.Name, Path: "direct", Busy: -1, ReadP99: -1}
	if a, b := was.Counters, v.Counters; a != nil && b != nil && a.Since.Equal(b.Since) {
		l.Reads, l.ReadBytes = float64(b.Reads-a.Reads)/span, float64(b.ReadBytes-a.ReadBytes)/span
		l.Writes, l.WriteBytes = float64(b.Writes-a.Writes)/span, float64(b.WriteBytes-a.WriteBytes)/span
		l.Flushes = float64(b.Flushes-a.Flushes) / span
	}
	w := v.Worker
	if w == nil {
		return l
	}
	l.Path = w.Kind
	if w.Hydration != nil {
		l.Absent = w.Hydration.Size - w.Hydration.Held
	}
	l.ReadP99 = w.Requests["read"].P99
	if was.Worker == nil || !was.Worker.Since.Equal(w.Since) {
		return l
	}
	l.Busy = 0
	for kind, served := range w.Requests {
		l.Busy += (served.Seconds - was.Worker.Requests[kind].Seconds) / span
	}
	cause, _ := mostWaited(was.Worker, w)
	l.Waits = cause
	return l
}

// mostWaited is what most of the waiting between two looks was for, "" for none,
// and how many seconds of requests.
func mostWaited(was, w *client.Worker) (cause string, seconds float64) {
	for _, c := range slices.Sorted(maps.Keys(w.Waiting)) {
		waited := w.Waiting[c].Seconds - was.Waiting[c].Seconds
		if waited > seconds {
			cause, seconds = c, waited
		}
	}
	return cause, seconds
}

func topRows(r *rows, lines []ioRate) {
	r.add("VOLUME", "PATH", "READS/S", "READ/S", "WRITES/S", "WRITTEN/S", "FLUSHES/S", "INSIDE", "READ P99", "WAITS FOR", "ABSENT")
	known := func(v float64, format string) string {
		if v < 0 {
			return ""
		}
		return fmt.Sprintf(format, v)
	}
	for _, l := range lines {
		p99 := ""
		if l.ReadP99 > 0 {
			p99 = time.Duration(l.ReadP99 * 1000).Round(time.Microsecond).String()
		}
		absent := ""
		if l.Absent > 0 {
			absent = bytesize.Human(l.Absent)
		}
		r.add(l.Volume, l.Path, fmt.Sprintf("%.0f", l.Reads), bytesize.Human(int64(l.ReadBytes)), fmt.Sprintf("%.0f", l.Writes), bytesize.Human(int64(l.WriteBytes)),
			fmt.Sprintf("%.0f", l.Flushes), known(l.Busy, "%.1f"), p99, l.Waits, absent)
	}
}

func (a *app) volumeWhy() *cobra.Command {
	var span time.Duration
	c := a.ofVolume("why NAME", "Say what a volume waits for", func(ctx context.Context, cl *client.Client, name string) error {
		was, err := cl.IO(ctx, name)
		if err != nil {
			return err
		}
		if was.Worker != nil && span > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(span):
			}
		}
		now, err := cl.IO(ctx, name)
		if err != nil {
			return err
		}
		return a.show(now, func(r *rows) { whyRows(r, was, now) })
	})
	c.Long = "Say what a volume waits for: its disk, a flush, blocks of its base that are not here yet, its own limits,\n" +
		"or something that this host does. Where a worker serves it, waiting is measured over a moment as well."
	c.Flags().DurationVar(&span, "span", time.Second, "how long waiting is measured; 0: not at all")
	return c
}

func whyRows(r *rows, was, now client.VolumeIO) {
	for _, w := range now.Waits {
		r.add("Waits for", w.Cause, w.Text)
	}
	w := now.Worker
	if w == nil || was.Worker == nil || !was.Worker.Since.Equal(w.Since) {
		return
	}
	var all float64
	for kind, served := range w.Requests {
		all += served.Seconds - was.Worker.Requests[kind].Seconds
	}
	for _, c := range slices.Sorted(maps.Keys(w.Waiting)) {
		waited := w.Waiting[c].Seconds - was.Worker.Waiting[c].Seconds
		if waited > 0 && all > 0 {
			r.add("In this moment", c, fmt.Sprintf("%.0f %% of the requests' time", min(100, 100*waited/all)))
		}
	}
	if h := w.Hydration; h != nil {
		r.add("Layers", fmt.Sprint(h.SealedLayers+1), fmt.Sprintf("%s of %s are in the top one", bytesize.Human(h.Held), bytesize.Human(h.Size)))
		if h.Reason != "" {
			r.add("Base", "failing", h.Reason)
		}
	}
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"holdfast/internal/run"
)

// path is one way from the guest's file to the bytes of the pool.
type path struct {
	name string
	node string // in the guest
	got  map[string][]float64
}

// pathLoad is one load of fio.
type pathLoad struct {
	name string
	args []string
	unit string
	of   func(ioRates) float64
}

func pathLoads() []pathLoad {
	requests := func(r ioRates) float64 { return r.reads + r.writes }
	megabytes := func(r ioRates) float64 { return (r.readBytes + r.writeBytes) / 1e6 }
	var all []pathLoad
	for _, depth := range []string{"1", "32"} {
		for _, rw := range []string{"randread", "randwrite"} {
			all = append(all, pathLoad{rw + " of 4 KiB, depth " + depth, []string{"--rw=" + rw, "--bs=4k", "--iodepth=" + depth}, "/s", requests})
		}
	}
	for _, rw := range []string{"read", "write"} {
		all = append(all, pathLoad{rw + " of 1 MiB, depth 4", []string{"--rw=" + rw, "--bs=1m", "--iodepth=4"}, "MB/s", megabytes})
	}
	return all
}

const pathMiB = 256

// paths: what a guest gets from the volume's file, from a loop device over such a
// file, and from a thin volume of LVM. This host has no LVM, so the thin volume lies in the
// guest, on a disk like the first.
func (b *VM) paths(ctx context.Context) (err error) {
	rounds := max(3, b.Rounds/6)
	if b.Quick {
		rounds = 1
	}
	loads := pathLoads()
	b.say("fio over file, loop and LV, %d rounds of %d loads", rounds, len(loads))
	if err := b.create(ctx, "path", pathMiB); err != nil {
		return err
	}
	at, err := b.attach(ctx, "path")
	if err != nil {
		return err
	}
	drop, err := b.plugPaths(ctx)
	if err != nil {
		return errors.Join(err, drop())
	}
	defer func() { err = errors.Join(err, drop()) }()
	var all []*path
	for _, p := range []*path{{name: "the volume's file", node: at.Serial}, {name: "a loop device on the host", node: "loop"}, {name: "a thin LV", node: "lv"}} {
		node, err := b.g.Disk(ctx, p.node)
		if err != nil {
			return err
		}
		if p.node == "lv" {
			if node, err = b.thinVolume(ctx, node); err != nil {
				return err
			}
		}
		p.node, p.got = node, map[string][]float64{}
		all = append(all, p)
		// Written once, so that no first write is measured.
		if err := b.g.Run(ctx, "dd", "if=/dev/zero", "of="+node, "bs=1M", fmt.Sprintf("count=%d", pathMiB), "oflag=direct", "conv=fsync"); err != nil {
			return err
		}
	}
	for n := range rounds {
		for _, l := range loads {
			for i := range all {
				p := all[(i+n)%len(all)] // each is the first as often as the others
				r, err := b.fio(ctx, p.node, l.args)
				if err != nil {
					return err
				}
				p.got[l.name] = append(p.got[l.name], l.of(r))
			}
		}
	}
	b.tellPaths(all, loads)
	_, err = b.d.Client.Detach(ctx, "path", at.ID)
	return err
}

// plugPaths plugs in what is beside the volume.
func (b *VM) plugPaths(ctx context.Context) (drop func() error, err error) {
	var loop string
	clean := context.WithoutCancel(ctx)
	drop = func() error {
		err := b.g.Run(clean, "sh", "-c", "vgchange -an vg >/dev/null 2>&1; true")
		for _, serial := range []string{"loop", "lv"} {
			err = errors.Join(err, b.g.Unplug(clean, serial))
		}
		if loop != "" {
			err = errors.Join(err, command(clean, "losetup", "--detach", loop))
		}
		return err
	}
	under, err := b.handImage(ctx, "loop", pathMiB)
	if err != nil {
		return drop, err
	}
	made, err := run.Run(ctx, run.Cmd{Args: []string{"losetup", "--find", "--show", "--direct-io=on", under}})
	if err != nil {
		return drop, err
	}
	loop = strings.TrimSpace(string(made.Stdout))
	group, err := b.handImage(ctx, "lv", 2*pathMiB)
	return drop, errors.Join(err,
		b.byHand(ctx, "loop", "host_device", loop, 0),
		b.byHand(ctx, "lv", "file", group, 0))
}

func (b *VM) thinVolume(ctx context.Context, disk string) (node string, err error) {
	script := fmt.Sprintf("set -e; wipefs -qa %s; vgcreate -qq vg %s; lvcreate -qq -y -L %dm -T vg/pool; lvcreate -qq -y -V %dm -T vg/pool -n volume", disk, disk, pathMiB+64, pathMiB)
	return "/dev/vg/volume", b.g.Run(ctx, "sh", "-c", script)
}

func (b *VM) fio(ctx context.Context, node string, args []string) (ioRates, error) {
	return b.fioFor(ctx, node, pathMiB, b.Each, args)
}

func (b *VM) fioFor(ctx context.Context, node string, mebibytes int, each time.Duration, args []string) (ioRates, error) {
	out, err := b.g.Output(ctx, append([]string{"fio", "--name=path", "--output-format=json", "--thread", "--direct=1", "--ioengine=libaio", "--filename=" + node,
		fmt.Sprintf("--size=%dm", mebibytes), "--time_based", fmt.Sprintf("--runtime=%dms", each.Milliseconds())}, args...)...)
	if err != nil {
		return ioRates{}, err
	}
	return ratesOf(out)
}

// tellPaths holds each path against the first, round by round.
func (b *VM) tellPaths(all []*path, loads []pathLoad) {
	for _, l := range loads {
		first := all[0].got[l.name]
		for _, p := range all[1:] {
			got := p.got[l.name]
			b.report.Rows = append(b.report.Rows, Row{Measure: p.name + ": " + l.name, Unit: l.unit, Samples: len(got), P50: middle(got),
				Yardstick: all[0].name, Beside: middle(first), Ratio: pairedRates(got, first)})
		}
	}
}

func middle(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// pairedRates is the median of the ratios of rates of the same round.
func pairedRates(ours, beside []float64) float64 {
	ratios := make([]float64, len(ours))
	for n := range ours {
		ratios[n] = ours[n] / beside[n]
	}
	return middle(ratios)
}

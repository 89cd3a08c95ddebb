package guesttest_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/vmtest"
)

// loads are what fio does in the guest, for a second each.
var loads = []struct{ name, args string }{
	{"randread qd1", "--rw=randread --iodepth=1"},
	{"randwrite qd1", "--rw=randwrite --iodepth=1"},
	{"randread qd32", "--rw=randread --iodepth=32"},
	{"randwrite qd32", "--rw=randwrite --iodepth=32"},
}

// BenchmarkAIO measures each way of QEMU to do a volume's I/O beside threads, by fio in
// a guest, a round of all ways at a time: go test -run - -bench AIO -benchtime 1x. "bare"
// is io_uring without the filter that bounds rates.
func BenchmarkAIO(b *testing.B) {
	blockdevtest.LeakCheck(b)
	const size, rounds = 256 * mib, 7
	guest := vmtest.Start(b, vmtest.Options{})
	door, err := vmsocket.New([]string{guest.Dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	ways := []string{"threads", "native", "io_uring", "bare"}
	nodes := map[string]string{}
	for n, way := range ways {
		v := newVolume(b, 20+n, size)
		fill(b, v.path, size)
		if way == "bare" {
			options := qmp.Args{"driver": "raw", "node-name": "bare", "file": qmp.Args{"driver": "file", "filename": v.path, "aio": "io_uring", "discard": "unmap", "cache": qmp.Args{"direct": true}}}
			command(b, guest, "blockdev-add", options)
			command(b, guest, "device_add", qmp.Args{"driver": "virtio-blk-pci", "id": "bare", "bus": "rp7", "drive": "bare", "serial": qemu.Serial(v.id), "werror": "enospc"})
		} else {
			a := qemu.New(qemu.Options{Door: door, AIO: qemu.AIO(way)})
			if err := a.Attach(b.Context(), request(v, resolve(b, a, guest))); err != nil {
				b.Fatal(err)
			}
		}
		nodes[way] = disk(b, guest, v.id)
	}
	for _, load := range loads {
		ratios := map[string][]float64{}
		for range rounds {
			iops := map[string]float64{}
			for _, way := range ways {
				iops[way] = run(b, guest, nodes[way], load.args)
			}
			for _, way := range ways {
				ratios[way] = append(ratios[way], iops[way]/iops["threads"])
			}
		}
		for _, way := range ways[1:] {
			slices.Sort(ratios[way])
			b.ReportMetric(ratios[way][rounds/2], strings.ReplaceAll(load.name+" "+way, " ", "-")+"/threads")
			b.Logf("%s %s: %.2f to %.2f", load.name, way, ratios[way][0], ratios[way][rounds-1])
		}
	}
}

// BenchmarkLimits measures what fio gets in a guest beside the limit: go test -run -
// -bench Limits -benchtime 1x.
func BenchmarkLimits(b *testing.B) {
	blockdevtest.LeakCheck(b)
	const size, rounds = 64 * mib, 5
	guest := vmtest.Start(b, vmtest.Options{})
	v := newVolume(b, 30, size)
	fill(b, v.path, size)
	door, err := vmsocket.New([]string{guest.Dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	a := qemu.New(qemu.Options{Door: door})
	r := request(v, resolve(b, a, guest))
	if err := a.Attach(b.Context(), r); err != nil {
		b.Fatal(err)
	}
	node := disk(b, guest, v.id)
	for _, c := range []struct {
		name, args string
		limits     blockdev.Limits
		limit      float64 // in requests of a second
	}{
		{"reads-200", "--rw=randread --iodepth=32", blockdev.Limits{ReadIOPS: 200}, 200},
		{"writes-200", "--rw=randwrite --iodepth=32", blockdev.Limits{WriteIOPS: 200}, 200},
		{"reads-1000", "--rw=randread --iodepth=32", blockdev.Limits{ReadIOPS: 1000}, 1000},
		{"writes-1000", "--rw=randwrite --iodepth=32", blockdev.Limits{WriteIOPS: 1000}, 1000},
		{"read-5MiB", "--rw=read --iodepth=4 --bs=256k", blockdev.Limits{ReadBytes: 5 * mib}, 20},
		{"write-5MiB", "--rw=write --iodepth=4 --bs=256k", blockdev.Limits{WriteBytes: 5 * mib}, 20},
	} {
		r.Limits = c.limits
		if err := a.Limit(b.Context(), r); err != nil {
			b.Fatal(err)
		}
		var ratios []float64
		for range rounds {
			ratios = append(ratios, run(b, guest, node, "--runtime=4 "+c.args)/c.limit)
		}
		slices.Sort(ratios)
		b.ReportMetric(ratios[rounds/2], c.name+"/limit")
		b.Logf("%s: %.3f to %.3f of the limit", c.name, ratios[0], ratios[rounds-1])
	}
}

func fill(b *testing.B, path string, size int) {
	b.Helper()
	text := slices.Repeat([]byte("0123456789abcdef"), size/16)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		b.Fatal(err)
	}
}

// run is fio's requests per second on a device of the guest.
func run(b *testing.B, guest *vmtest.VM, node, args string) float64 {
	b.Helper()
	out := guest.Sh(b, fmt.Sprintf("fio --name=x --filename=%s --direct=1 --bs=4k --ioengine=libaio --time_based --runtime=1 --output-format=json %s", node, args))
	var found struct {
		Jobs []struct {
			Read, Write struct{ IOPS float64 }
		}
	}
	if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &found); err != nil || len(found.Jobs) != 1 {
		b.Fatalf("%v: %s", err, out)
	}
	return found.Jobs[0].Read.IOPS + found.Jobs[0].Write.IOPS
}

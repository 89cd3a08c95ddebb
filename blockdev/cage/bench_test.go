package cage_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"holdfast/blockdev/cage"
	"holdfast/blockdev/filesystem"
)

// BenchmarkGrow grows an unmounted ext4 from 64 MiB to 1 GiB (e2fsck, resize2fs),
// three times in each round: on this host, in a cage that waits, and in one that
// must be made first. Told are the medians, and their ratios to the host's.
func BenchmarkGrow(b *testing.B) {
	host := filesystem.NewTools()
	warm := open(b, func(o *cage.Options) { o.Warm = 1 })
	cold := open(b, nil)
	path := image(b, 64<<20)
	made, err := os.ReadFile(path)
	must(b, err)
	ways := []struct {
		name  string
		tools filesystem.Tools
		took  []time.Duration
	}{{name: "host", tools: host}, {name: "warm", tools: host.In(warm)}, {name: "cold", tools: host.In(cold)}}
	for b.Loop() {
		for i := range ways {
			must(b, os.WriteFile(path, made, 0o600))
			must(b, os.Truncate(path, 1<<30))
			syncAll(b, path)
			warm.Settle()
			cold.Settle()
			time.Sleep(50 * time.Millisecond) // the kernel takes former cages away
			begin := time.Now()
			must(b, ways[i].tools.Grow(b.Context(), path, filesystem.Ext4))
			ways[i].took = append(ways[i].took, time.Since(begin))
			must(b, os.Truncate(path, 0))
		}
	}
	b.ReportMetric(0, "ns/op")
	var yardstick float64
	for _, w := range ways {
		slices.Sort(w.took)
		median := w.took[len(w.took)/2].Seconds() * 1000
		if w.name == "host" {
			yardstick = median
		}
		b.ReportMetric(median, w.name+"-ms")
		b.ReportMetric(median/yardstick, w.name+"/host")
	}
}

func syncAll(b *testing.B, path string) {
	b.Helper()
	f, err := os.Open(path)
	must(b, err)
	must(b, f.Sync())
	must(b, f.Close())
	dir, err := os.Open(filepath.Dir(path))
	must(b, err)
	must(b, dir.Sync())
	must(b, dir.Close())
}

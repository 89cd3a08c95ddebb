package metadata

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkUpdate writes records of 2 KiB, each by its own Update. Its yardstick
// is an appended and synced write of 4 KiB in the same directory.
func BenchmarkUpdate(b *testing.B) {
	b.Run("synced-write-4KiB", func(b *testing.B) {
		f, err := os.Create(filepath.Join(b.TempDir(), "f"))
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		page := make([]byte, 4096)
		measure(b, 1, func(int) error {
			if _, err := f.Write(page); err != nil {
				return err
			}
			return f.Sync()
		})
	})
	for _, clients := range []int{1, 32} {
		b.Run(fmt.Sprintf("clients-%d", clients), func(b *testing.B) {
			s := openStore(b, b.TempDir(), Options{})
			record := thing{Name: strings.Repeat("x", 2000)}
			measure(b, clients, func(i int) error {
				return s.Update(b.Context(), func(tx *Tx) error {
					return things.Put(tx, fmt.Sprint(i%10000), record)
				})
			})
			st, _ := s.Stats()
			b.ReportMetric(float64(st.Updates)/float64(st.Commits), "updates/commit")
		})
	}
	b.Run("view-beside-4-writers", func(b *testing.B) {
		s := openStore(b, b.TempDir(), Options{})
		var stop atomic.Bool
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				for i := 0; !stop.Load(); i++ {
					put(b, s, fmt.Sprint(g), i)
				}
			})
		}
		measure(b, 1, func(i int) error { return s.View(func(tx *Tx) error { return nil }) })
		stop.Store(true)
		wg.Wait()
	})
}

func measure(b *testing.B, clients int, op func(i int) error) {
	var next atomic.Int64
	var mu sync.Mutex
	var took []time.Duration
	var wg sync.WaitGroup
	b.ResetTimer()
	for range clients {
		wg.Go(func() {
			var mine []time.Duration
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				start := time.Now()
				if err := op(int(i)); err != nil {
					b.Error(err)
				}
				mine = append(mine, time.Since(start))
			}
			mu.Lock()
			took = append(took, mine...)
			mu.Unlock()
		})
	}
	wg.Wait()
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "op/s")
}

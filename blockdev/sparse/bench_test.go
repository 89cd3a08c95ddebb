package sparse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/sys"
)

// benchmarkPool is a pool as the daemon makes it where nothing can be shared,
// with a source image of some extents.
func benchmarkPool(b *testing.B) (*Pool, blockdev.ID) {
	b.Helper()
	blockdevtest.Require(b, blockdevtest.ReflinkPool)
	dir := b.TempDir()
	p, err := Prepare(b.Context(), dir, Image, 1<<30)
	if err != nil {
		b.Fatal(err)
	}
	pool, err := Open(b.Context(), p.Dir, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		pool.Shutdown()
		unprepareBenchmark(b, dir)
	})
	src := blockdevtest.NewID("src")
	if err := pool.Create(b.Context(), src, 1<<30); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", filepath.Join(pool.draft(src), imageFile)).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	if err := pool.Publish(b.Context(), src, nil); err != nil {
		b.Fatal(err)
	}
	return pool, src
}

func unprepareBenchmark(b *testing.B, dir string) {
	if err := Unprepare(context.Background(), dir); err != nil {
		b.Error(err)
	}
}

// create clones, changes a block as the engine does with the filesystem's
// identity, and publishes.
func create(b *testing.B, pool *Pool, src blockdev.ID) {
	id := blockdevtest.NewID("vol")
	if err := pool.Clone(b.Context(), id, src, 1<<30); err != nil {
		b.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(pool.draft(id), imageFile), os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("identity"), 1024+104)
		f.Close()
	}
	if err != nil {
		b.Fatal(err)
	}
	if err := pool.Publish(b.Context(), id, make([]byte, 700)); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkCreate tells the durable create of one volume beside its yardstick:
// a reflink copy with fsync of file and directory, in the same pool and round.
func BenchmarkCreate(b *testing.B) {
	pool, src := benchmarkPool(b)
	var creates, copies []time.Duration
	for i := range b.N {
		start := time.Now()
		create(b, pool, src)
		creates = append(creates, time.Since(start))
		start = time.Now()
		reflinkAndSync(b, pool, src, i)
		copies = append(copies, time.Since(start))
	}
	slices.Sort(creates)
	slices.Sort(copies)
	b.ReportMetric(float64(creates[len(creates)/2].Microseconds()), "create-p50-us")
	b.ReportMetric(float64(creates[len(creates)*99/100].Microseconds()), "create-p99-us")
	b.ReportMetric(float64(copies[len(copies)/2].Microseconds()), "reflink-p50-us")
	b.ReportMetric(float64(creates[len(creates)/2])/float64(copies[len(copies)/2]), "ratio")
}

func reflinkAndSync(b *testing.B, pool *Pool, src blockdev.ID, i int) {
	from, err := os.Open(filepath.Join(pool.image(src), imageFile))
	if err != nil {
		b.Fatal(err)
	}
	defer from.Close()
	to, err := os.Create(filepath.Join(pool.Staging(), fmt.Sprint(i)))
	if err != nil {
		b.Fatal(err)
	}
	defer to.Close()
	for _, step := range []func() error{
		func() error { return sys.CloneFile(to, from) }, to.Sync, func() error { return sys.SyncDir(pool.Staging()) },
	} {
		if err := step(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCreateBy32 tells how many durable creates a second 32 clients get.
func BenchmarkCreateBy32(b *testing.B) {
	pool, src := benchmarkPool(b)
	b.SetParallelism(16)
	var n atomic.Int64
	start := time.Now()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			create(b, pool, src)
			n.Add(1)
		}
	})
	b.ReportMetric(float64(n.Load())/time.Since(start).Seconds(), "creates/s")
}

// BenchmarkSnapshotFragmented takes snapshots of an image of 1 GiB in 75,000 pieces, on
// a filesystem with reflink.
func BenchmarkSnapshotFragmented(b *testing.B) {
	blockdevtest.Require(b, blockdevtest.ReflinkPool)
	p, err := Open(b.Context(), filepath.Join(blockdevtest.ReflinkDir(b, blockdevtest.Size(4<<30)), "pool"), Options{Rate: -1})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Shutdown()
	p.layers = true
	vol := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(p.Create(b.Context(), vol, 1<<30), p.Publish(b.Context(), vol, nil)); err != nil {
		b.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(p.image(vol), imageFile), os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	for i := range int64(75_000) { // a hole behind each block
		if _, err := f.WriteAt(make([]byte, 4096), i*12288); err != nil {
			b.Fatal(err)
		}
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		b.StopTimer()
		access, err := p.Access(b.Context(), vol, false) // so that there is something to seal
		if err == nil {
			_, err = access.WriteAt([]byte{1}, 0)
			err = errors.Join(err, access.Sync(), access.Close())
		}
		snap := blockdevtest.NewID(blockdev.PrefixSnapshot)
		b.StartTimer()
		_, snapErr := p.Snapshot(b.Context(), snap, vol)
		b.StopTimer()
		if err := errors.Join(err, snapErr, p.Flatten(b.Context(), vol), p.Remove(b.Context(), snap)); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

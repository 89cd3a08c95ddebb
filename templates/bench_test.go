package templates_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/run"
)

// BenchmarkIngest is an upload from its first byte to READY.
func BenchmarkIngest(b *testing.B) {
	archive := many(b, 15_000, 18_000)
	blockdevtest.LeakCheck(b)
	r := newRig(b, blockdevtest.ReflinkDir(b, blockdevtest.Size(8<<30)), nil)
	b.SetBytes(int64(len(archive)))
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		archive[1024+i]++ // of the first file: another tree each time, in a template without another version
		name := fmt.Sprint("app-", i)
		r.put(name)
		b.StartTimer()
		r.push(name, archive)
	}
}

// BenchmarkYardstick is what is done by hand: unpack, make an image of it.
func BenchmarkYardstick(b *testing.B) {
	archive := many(b, 15_000, 18_000)
	dir := blockdevtest.ReflinkDir(b, blockdevtest.Size(8<<30))
	b.SetBytes(int64(len(archive)))
	for b.Loop() {
		tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "image")
		if err := os.Mkdir(tree, 0o755); err != nil {
			b.Fatal(err)
		}
		for _, c := range []run.Cmd{
			{Args: []string{"tar", "x", "-C", tree}, Stdin: bytes.NewReader(archive)},
			{Args: []string{"mke2fs", "-q", "-t", "ext4", "-d", tree, image, "320m"}},
			{Args: []string{"sync", "-f", image}},
		} {
			if _, err := run.Run(context.Background(), c); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		for _, path := range []string{tree, image} {
			if err := os.RemoveAll(path); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
	}
}

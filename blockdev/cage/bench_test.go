package cage_test

import (
	"os"
	"testing"
	"time"

	"holdfast/blockdev/cage"
	"holdfast/blockdev/filesystem"
)

// BenchmarkGrow grows an unmounted ext4 from 64 MiB to 1 GiB (e2fsck, resize2fs):
// on this host, in a cage that waits, and in one that must be made first. The time
// in which a cage is made for the next round does not count for the second.
func BenchmarkGrow(b *testing.B) {
	host := filesystem.NewTools()
	b.Run("host", func(b *testing.B) { grow(b, host, func() {}) })
	b.Run("warm", func(b *testing.B) {
		c := open(b, func(o *cage.Options) { o.Warm = 1 })
		grow(b, host.In(c), func() { c.Settle(); time.Sleep(150 * time.Millisecond) })
	})
	b.Run("cold", func(b *testing.B) {
		c := open(b, nil)
		grow(b, host.In(c), func() { c.Settle(); time.Sleep(150 * time.Millisecond) })
	})
}

func grow(b *testing.B, tools filesystem.Tools, settle func()) {
	b.Helper()
	path := image(b, 64<<20)
	made, err := os.ReadFile(path)
	must(b, err)
	for b.Loop() {
		b.StopTimer()
		must(b, os.Truncate(path, 0))
		must(b, os.WriteFile(path, made, 0o600))
		must(b, os.Truncate(path, 1<<30))
		settle()
		b.StartTimer()
		must(b, tools.Grow(b.Context(), path, filesystem.Ext4))
	}
}

package cage_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/cage"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/run"
)

// TestDamagedImages flips bytes in metadata: a tool mends it, or says that it
// cannot, and never hangs, takes the cage away or harms what is beside it.
func TestDamagedImages(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.XFS, blockdevtest.Btrfs)
	blockdevtest.LeakCheck(t)
	c := open(t, func(o *cage.Options) { o.Warm = 1 })
	tools := filesystem.NewTools().In(c)
	for _, f := range []struct {
		t      filesystem.Type
		size   int64
		make   []string
		from   int64 // metadata lies from here
		to     int64 // to there
		noise  int   // pieces at most
		rounds int
	}{
		{filesystem.Ext4, 16 << 20, []string{"mkfs.ext4", "-q", "-F", "-d", "/usr/lib/systemd"}, 4096, 1 << 20, 200, 8},
		{filesystem.XFS, 300 << 20, []string{"mkfs.xfs", "-q", "-f"}, 512, 256 << 10, 200, 4},
		{filesystem.Btrfs, 128 << 20, []string{"mkfs.btrfs", "-q", "-f", "--rootdir", "/usr/lib/systemd/system"}, 37 << 20, 72 << 20, 4000, 4},
	} {
		t.Run(string(f.t), func(t *testing.T) {
			good := filepath.Join(t.TempDir(), "good")
			must(t, os.WriteFile(good, nil, 0o600))
			must(t, os.Truncate(good, f.size))
			if out, err := exec.Command(f.make[0], append(f.make[1:], good)...).CombinedOutput(); err != nil {
				out2, err2 := exec.Command(f.make[0], append(f.make[1:len(f.make)-2], good)...).CombinedOutput()
				if err2 != nil {
					t.Fatalf("%v: %s; %v: %s", err, out, err2, out2)
				}
			}
			worse := 0
			for round := range f.rounds {
				path := good + "-damaged"
				must(t, exec.Command("cp", "--sparse=always", good, path).Run())
				damage(t, path, f.from, f.to, f.noise, rand.New(rand.NewPCG(uint64(round), 1)))
				err := tools.Check(t.Context(), path, f.t, true)
				if f.t == filesystem.Ext4 {
					must(t, os.Truncate(path, 2*f.size))
					err = errors.Join(err, tools.Grow(t.Context(), path, f.t))
				}
				var failed *run.Error
				switch {
				case errors.Is(err, cage.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
					t.Errorf("round %d: %v", round, err)
				case err == nil:
				case !errors.As(err, &failed) && !errors.Is(err, filesystem.ErrDamaged) && !errors.Is(err, filesystem.ErrDirty):
					t.Errorf("round %d: an error of no kind: %v", round, err)
				default:
					worse++
					t.Logf("round %d: %.300v", round, err)
				}
				must(t, os.Remove(path))
			}
			t.Logf("%d of %d could not be mended", worse, f.rounds)
		})
	}
}

// damage overwrites some places of an image's metadata with noise. The primary
// superblock is spared in most rounds: it ends most checks at once.
func damage(t *testing.T, path string, from, to int64, most int, r *rand.Rand) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	if r.IntN(4) == 0 {
		from = 0
	}
	for range 1 + r.IntN(most) {
		noise := make([]byte, 1+r.IntN(8))
		for i := range noise {
			noise[i] = byte(r.Uint32())
		}
		_, err := f.WriteAt(noise, from+r.Int64N(to-from))
		must(t, err)
	}
}

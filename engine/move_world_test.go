package engine

import (
	"context"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/pools"
)

const secondPool = "second"

// newWorldOfTwo is a world with two pools.
func newWorldOfTwo(t testing.TB) *world {
	w := newWorld(t)
	w.second = blockdevtest.NewMemory()
	w.second.Failpoint = func(point string) error { return w.point(secondPool + " " + point) }
	w.restart(false)
	return w
}

// addSecond gives an engine the second pool, if there is one.
func (w *world) addSecond(o *Options) {
	if w.second == nil {
		return
	}
	set, err := pools.New(
		pools.Pool{Name: o.PoolName, Kind: "memory", Backend: w.pool},
		pools.Pool{Name: secondPool, Kind: "memory", Backend: apart{w.second}},
	)
	if err != nil {
		w.t.Fatal(err)
	}
	o.Pool, o.Copy = set, w.copyBetween
	o.Others = []OtherPool{{Name: secondPool, Kind: "memory", Ledger: NewLedger(LedgerOptions{Total: 8 << 30, Ratio: 1})}}
}

// apart is a Memory whose paths are told from those of the other.
type apart struct{ *blockdevtest.Memory }

func (a apart) Open(ctx context.Context, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
	e, err := a.Memory.Open(ctx, id, w)
	e.Path = secondPool + ":" + e.Path
	return e, err
}

// Image implements imager.
func (w *world) Image(path string) (*blockdevtest.MemoryImage, error) {
	if rest, ok := strings.CutPrefix(path, secondPool+":"); ok {
		return w.second.Image(rest)
	}
	return w.pool.Image(path)
}

// copyPiece is how much copyBetween takes at once, so that small volumes have pieces.
const copyPiece = 256 << 10

// copyBetween is the engine's Copy: of blocks that are not zero.
func (w *world) copyBetween(_ context.Context, dst, src string, from, _ int64) (next, copied int64, err error) {
	in, err := w.Image(src)
	if err != nil {
		return from, 0, err
	}
	out, err := w.Image(dst)
	if err != nil {
		return from, 0, err
	}
	next = min(from+copyPiece, in.Size())
	err = w.effect("copy", func() {
		b := make([]byte, 4096)
		for at := from; at < next && err == nil; at += int64(len(b)) {
			if _, err = in.ReadAt(b, at); err == nil && strings.Trim(string(b), "\x00") != "" {
				copied += int64(len(b))
				_, err = out.WriteAt(b, at)
			}
		}
	})
	if err != nil {
		return from, 0, err
	}
	return next, copied, nil
}

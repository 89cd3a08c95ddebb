package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
)

// moveLife moves a volume there and back, and deletes one that is on its way; each
// step is done again after a cut. It says what is acknowledged of "v".
func moveLife(t *testing.T, w *world) []func() error {
	ctx := context.Background()
	create := func(name string) func() error {
		return func() error {
			_, err := w.engine.CreateVolume(ctx, CreateVolume{Workspace: space, Name: name, Filesystem: "none", SizeMiB: mib(1), IdempotencyKey: "key-" + name})
			if err == nil {
				w.stripe(t, name)
			}
			return err
		}
	}
	return []func() error{
		create("v"),
		func() error { return w.moveTo("v", secondPool) },
		func() error { return w.moveTo("v", "memory") },
		create("doomed"),
		func() error {
			_, err := w.engine.MoveVolume(ctx, space, "doomed", secondPool, "")
			return gone(err)
		},
		func() error { return gone(w.tendOnce()) },
		func() error { return deleteOp("doomed").do(w) },
	}
}

func gone(err error) error {
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// tendOnce takes the moves on by a piece: something else is wanted of the volumes.
func (w *world) tendOnce() error {
	copyOf, pieces := w.engine.o.Copy, 0
	defer func() { w.engine.o.Copy = copyOf }()
	w.engine.o.Copy = func(ctx context.Context, dst, src string, from, most int64) (int64, int64, error) {
		if pieces++; pieces > 2 {
			return from, 0, errPause
		}
		return copyOf(ctx, dst, src, from, most)
	}
	if err := w.engine.tend(context.Background()); !errors.Is(err, errPause) {
		return err
	}
	return nil
}

var errPause = errors.New("enough for now")

func (w *world) verifyMoveEnd(t *testing.T) {
	t.Helper()
	w.verifyPools(t)
	w.verifyStripes(t, "v")
	page, err := w.engine.List(space, Query{})
	if err != nil || len(page.Volumes) != 1 || page.Volumes[0].Pool != "" {
		t.Fatalf("at the end there are %+v, %v", page.Volumes, err)
	}
}

func movePoints(t *testing.T) []string {
	w := newWorldOfTwo(t)
	w.arm(0, false)
	for i, do := range moveLife(t, w) {
		if err := do(); err != nil {
			t.Fatalf("step %d without a cut: %v", i, err)
		}
	}
	w.verifyMoveEnd(t)
	return slices.Clone(w.points)
}

// TestMoveAtEveryCrashPoint cuts moves at every side effect, by the death of the
// process, of the power, and of the records as well: no byte of a volume is lost, it
// is in one pool at the end, and what was asked for comes about.
func TestMoveAtEveryCrashPoint(t *testing.T) {
	total := len(movePoints(t))
	t.Logf("%d side effects", total)
	for _, way := range []string{"process", "power", "records"} {
		for cut := 1; cut <= total; cut++ {
			t.Run(fmt.Sprintf("%s/%03d", way, cut), func(t *testing.T) {
				t.Parallel()
				cutMove(t, way, cut)
			})
		}
	}
}

func cutMove(t *testing.T, way string, cut int) {
	w := newWorldOfTwo(t)
	steps, at := moveLife(t, w), 0
	w.arm(cut, true)
	for at < len(steps) && steps[at]() == nil && !w.crashed {
		at++
	}
	if !w.crashed {
		t.Fatal("the cut was not reached")
	}
	where := w.lastPoint()
	switch way {
	case "records":
		w.mu.Lock()
		w.cut, w.crashed = 0, false
		w.mu.Unlock()
		w.loseRecords(t)
	default:
		w.restart(way == "power")
	}
	if at > 0 {
		w.verifyStripes(t, "v")
	}
	if t.Failed() {
		t.Fatalf("cut at %s, in step %d", where, at)
	}
	for i, do := range moveLife(t, w)[at:] {
		err := do()
		if errors.Is(err, ErrExists) { // without records, nor is a key remembered
			err = nil
			w.stripe(t, []string{"v", "", "", "doomed"}[at+i])
		}
		if err != nil {
			t.Fatalf("cut at %s, in step %d: after it, step %d: %v", where, at, at+i, err)
		}
	}
	w.verifyMoveEnd(t)
	w.restart(true)
	w.verifyMoveEnd(t)
	if t.Failed() {
		t.Fatalf("cut at %s, in step %d", where, at)
	}
}

// TestMoveAtEveryErrorPoint lets every side effect fail once, with the process living on.
func TestMoveAtEveryErrorPoint(t *testing.T) {
	points := movePoints(t)
	for cut := 1; cut <= len(points); cut++ {
		if len(points[cut-1]) > 9 && points[cut-1][:9] == "metadata." {
			continue // a failed commit ends the process
		}
		t.Run(fmt.Sprintf("%03d", cut), func(t *testing.T) {
			t.Parallel()
			w := newWorldOfTwo(t)
			w.arm(cut, false)
			for i, do := range moveLife(t, w) {
				err := do()
				for try := 0; err != nil && try < 3; try++ {
					_ = w.engine.tend(context.Background())
					err = do()
				}
				if err != nil {
					t.Fatalf("step %d, failed once at %s: %v", i, points[cut-1], err)
				}
			}
			_ = w.engine.tend(context.Background())
			w.verifyMoveEnd(t)
			w.restart(true)
			w.verifyMoveEnd(t)
			if t.Failed() {
				t.Fatalf("failed once at %s", points[cut-1])
			}
		})
	}
}

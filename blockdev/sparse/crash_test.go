package sparse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

var errCut = errors.New("the process dies here")

// story is what happens to images in the crash test, step by step. Each step is
// idempotent, as the engine's steps are.
type story struct {
	t    *testing.T
	pool *Pool
	src  blockdev.ID
	vol  blockdev.ID
	e    blockdev.Endpoint
}

func (s *story) steps() []func() error {
	ctx := s.t.Context()
	block := blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}}
	return []func() error{
		func() error { return s.unlessThere(s.src, func() error { return s.pool.Create(ctx, s.src, 1<<20) }) },
		func() error { return s.pool.Publish(ctx, s.src, []byte("source")) },
		func() error {
			return s.unlessThere(s.vol, func() error { return s.pool.Clone(ctx, s.vol, s.src, 2<<20) })
		},
		func() error { return s.pool.Publish(ctx, s.vol, []byte("1")) },
		func() (err error) { s.e, err = s.pool.Open(ctx, s.vol, block); return err },
		func() error { return s.pool.Grow(ctx, s.vol, 3<<20) },
		func() error { return s.pool.Close(ctx, s.vol, s.e.Lease) },
		func() (err error) { s.e, err = s.pool.Open(ctx, s.vol, block); return err },
		func() error { return s.pool.Sever(ctx, s.vol) },
		func() error { return s.pool.Describe(ctx, s.vol, []byte("2")) },
		func() error { return s.pool.Remove(ctx, s.src) },
		func() error { return s.damage(s.vol) },
		func() error { _, err := s.pool.List(ctx); return err },
	}
}

func (s *story) unlessThere(id blockdev.ID, make func() error) error {
	if info, err := s.pool.Stat(s.t.Context(), id); err == nil && !info.Draft {
		return nil
	}
	return make()
}

func (s *story) damage(id blockdev.ID) error {
	if there, err := exists(s.pool.image(id)); err != nil || !there {
		return err
	}
	return os.WriteFile(filepath.Join(s.pool.image(id), descriptionFile), []byte("damaged"), 0o600)
}

// TestCrashBetweenAnySteps cuts the life of an image at every point between two
// side effects, opens the pool anew, and repeats the step that was cut: the
// story ends the same way, and nothing is lost or left.
func TestCrashBetweenAnySteps(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool)
	blockdevtest.LeakCheck(t)
	base := blockdevtest.ReflinkDir(t)
	points := map[string]bool{}
	for cut := 0; ; cut++ {
		k := keep(t, filepath.Join(base, fmt.Sprint(cut)))
		s := &story{t: t, src: blockdevtest.NewID("src"), vol: blockdevtest.NewID("vol")}
		passed, crashed := 0, ""
		arm := func() {
			s.pool = k.open(t)
			s.pool.crash = func(point string) error {
				if passed++; passed == cut+1 {
					crashed = point
					return errCut
				}
				return nil
			}
		}
		arm()
		for i, step := range s.steps() {
			err := step()
			if errors.Is(err, errCut) {
				arm()
				err = s.steps()[i]()
			}
			if err != nil {
				t.Fatalf("cut %d at %s: step %d: %v", cut, crashed, i, err)
			}
		}
		s.end(cut, crashed)
		if crashed == "" {
			break
		}
		points[crashed] = true
	}
	for _, point := range []string{"create.image", "create.size", "publish.description", "publish.rename", "publish.flush", "describe.rename",
		"describe.flush", "open.attach", "grow.flush", "grow.device", "close.flush",
		"sever.abandon", "sever.rename", "sever.flush", "remove.rename", "remove.flush", "quarantine.rename"} {
		if !points[point] {
			t.Errorf("the story was not cut at %s", point)
		}
	}
}

// end checks how every story ends.
func (s *story) end(cut int, crashed string) {
	t := s.t
	infos, err := s.pool.List(t.Context())
	if err != nil || len(infos) != 0 {
		t.Errorf("cut %d at %s: listed %+v, %v", cut, crashed, infos, err)
	}
	found, err := s.pool.Quarantined(t.Context())
	if err != nil || len(found) != 1 {
		t.Errorf("cut %d at %s: quarantined %+v, %v", cut, crashed, found, err)
	}
	for _, dir := range []string{imagesDir, draftsDir} {
		if entries, err := os.ReadDir(s.pool.path(dir)); err != nil || len(entries) != 0 {
			t.Errorf("cut %d at %s: %s has %v, %v", cut, crashed, dir, entries, err)
		}
	}
	if loops := blockdevtest.LoopsUnder(t, s.pool.dir); len(loops) != 0 {
		t.Errorf("cut %d at %s: devices %v are left", cut, crashed, loops)
	}
}

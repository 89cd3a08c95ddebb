package pools_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/pools"
)

const (
	size = 1 << 20
	one  = blockdev.ID("vol-06c8qk4g1h6s9tj2m0a4n7v5b0")
	two  = blockdev.ID("vol-06c8qk4g1h6s9tj2m0a4n7v5c0")
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sick is a pool that does not answer.
type sick struct{ blockdev.Backend }

var (
	errSick = errors.New("input/output error")
	errShut = fmt.Errorf("%w: there is no such pool", blockdev.ErrInvalid)
)

func (sick) Stat(context.Context, blockdev.ID) (blockdev.Info, error) {
	return blockdev.Info{}, errSick
}
func (sick) List(context.Context) ([]blockdev.Info, error) { return nil, errSick }
func (sick) Quarantined(context.Context) ([]blockdev.Quarantine, error) {
	return nil, errSick
}

// TestPlaces: an image is where it was placed, at home where nobody placed it, and
// found where it is by a set that has just been made.
func TestPlaces(t *testing.T) {
	ctx := t.Context()
	home, other := blockdevtest.NewMemory(), blockdevtest.NewMemory()
	open := func() *pools.Set {
		s, err := pools.New(pools.Pool{Name: "home", Backend: home}, pools.Pool{Name: "other", Backend: other})
		must(t, err)
		return s
	}
	s := open()
	must(t, s.Place(two, "other"))
	for _, id := range []blockdev.ID{one, two} {
		must(t, s.Create(ctx, id, size))
		must(t, s.Publish(ctx, id, []byte("{}")))
	}
	for id, in := range map[blockdev.ID]blockdev.Backend{one: home, two: other} {
		if _, err := in.Stat(ctx, id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	if err := s.Clone(ctx, "vol-06c8qk4g1h6s9tj2m0a4n7v5d0", two, size); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a clone from pool to pool: %v", err)
	}
	again := open()
	all, err := again.List(ctx)
	must(t, err)
	where := map[blockdev.ID]string{}
	for _, i := range all {
		where[i.ID] = i.Pool
	}
	if where[one] != "" || where[two] != "other" {
		t.Errorf("listed in %v", where)
	}
	if _, err := open().Stat(ctx, two); err != nil {
		t.Errorf("an image that nobody placed in this life: %v", err)
	}
	if err := s.Place(one, "third"); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("a pool that is not there: %v", err)
	}
	if _, err := s.Stat(ctx, one); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("an image in a pool that is not there: %v", err)
	}
}

// TestSickPool: a pool that is not open, or does not answer, keeps no other from work.
func TestSickPool(t *testing.T) {
	ctx := t.Context()
	home := blockdevtest.NewMemory()
	s, err := pools.New(pools.Pool{Name: "home", Backend: home}, pools.Pool{Name: "sick", Backend: sick{blockdevtest.NewMemory()}}, pools.Pool{Name: "shut", Err: errShut})
	must(t, err)
	told := map[string]int{}
	s.OnTrouble(func(pool string, err error) {
		if !errors.Is(err, errSick) {
			t.Errorf("%v", err)
		}
		told[pool]++
	})
	must(t, s.Create(ctx, one, size))
	must(t, s.Publish(ctx, one, []byte("{}")))
	if all, err := s.List(ctx); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
	if _, err := s.Quarantined(ctx); err != nil {
		t.Error(err)
	}
	if _, err := s.Stat(ctx, two); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("an image that is nowhere: %v", err)
	}
	if told["sick"] == 0 || told["shut"] != 0 {
		t.Errorf("told of %v", told)
	}
	must(t, s.Place(two, "shut"))
	if err := s.Create(ctx, two, size); !errors.Is(err, blockdev.ErrUnavailable) || errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), `"shut"`) || strings.Contains(err.Error(), errShut.Error()) {
		t.Errorf("a create in a pool that is not open: %v", err)
	}
	if _, err := pools.New(pools.Pool{Name: "home", Err: errSick}); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a home that is not open: %v", err)
	}
}

// TestForwards: what only some pools can is asked of the image's own pool.
func TestForwards(t *testing.T) {
	ctx := t.Context()
	other := blockdevtest.NewMemory()
	other.Layered = true
	s, err := pools.New(pools.Pool{Name: "home", Backend: sick{blockdevtest.NewMemory()}}, pools.Pool{Name: "other", Backend: other})
	must(t, err)
	must(t, s.Place(two, "other"))
	must(t, s.Create(ctx, two, size))
	must(t, s.Publish(ctx, two, nil))
	e, err := s.Open(ctx, two, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
	must(t, err)
	limits := blockdev.Limits{WriteIOPS: 7}
	must(t, s.Throttle(ctx, two, limits))
	if service, err := s.Observe(ctx, two); err != nil || service.Limits != limits {
		t.Errorf("observed %+v, %v", service, err)
	}
	must(t, s.Close(ctx, two, e.Lease))
	snap := blockdevtest.NewID(blockdev.PrefixSnapshot)
	_, err = s.Snapshot(ctx, snap, two)
	must(t, err)
	if info, err := other.Stat(ctx, snap); err != nil || info.Layers == 0 {
		t.Errorf("a snapshot that nobody placed: %+v, %v", info, err)
	}
	must(t, s.Flatten(ctx, two))
	b, err := s.Access(ctx, two, true)
	must(t, err)
	must(t, b.Close())
	must(t, s.Place(snap, "home"))
	if _, err := s.Snapshot(ctx, snap, two); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a snapshot in another pool: %v", err)
	}
	// The home can do none of it.
	must(t, s.Place(one, ""))
	if _, err := s.Observe(ctx, one); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("observed where there are no workers: %v", err)
	}
	if err := s.Throttle(ctx, one, limits); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("throttled where there are no workers: %v", err)
	}
	if _, err := s.Access(ctx, one, true); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("access: %v", err)
	}
	if err := s.Flatten(ctx, one); !errors.Is(err, errSick) {
		t.Errorf("flatten where all is flat: %v", err)
	}
}

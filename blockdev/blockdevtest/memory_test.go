package blockdevtest

import (
	"errors"
	"testing"

	"holdfast/blockdev"
)

// heldImage keeps its device in use, as an open node does.
type heldImage struct {
	*MemoryImage
	release func()
}

func (f heldImage) Close() error { f.release(); return f.MemoryImage.Close() }

func TestMemory(t *testing.T) {
	for name, layered := range map[string]bool{"sharing": false, "layered": true} {
		t.Run(name, func(t *testing.T) {
			TestBackend(t, func(*testing.T) Place {
				m := NewMemory()
				m.Layered = layered
				kinds := []blockdev.Kind{blockdev.Block, blockdev.File, blockdev.VhostUser, blockdev.NBD}
				if layered { // whose images are opened as what they always can be
					kinds = kinds[2:]
				}
				return memoryPlace(m, kinds)
			})
		})
	}
}

func memoryPlace(m *Memory, kinds []blockdev.Kind) Place {
	return Place{
		Open:   func(*testing.T) blockdev.Backend { m.Restart(Restarted{}); return m },
		Damage: func(_ *testing.T, id blockdev.ID) { m.Damage(id) },
		Access: func(t *testing.T, e blockdev.Endpoint) File {
			image, err := m.Image(e.Path)
			if err != nil {
				t.Fatal(err)
			}
			release, err := m.Hold(image.ID())
			if err != nil {
				t.Fatal(err)
			}
			return heldImage{image, release}
		},
		Kinds:  kinds,
		Clones: true, Snapshots: true, Layered: m.Layered,
	}
}

// TestMemoryWorker: the worker of an image tells how it does, takes limits, and one
// that died is started again by Open.
func TestMemoryWorker(t *testing.T) {
	m, id, ctx := NewMemory(), NewID("vol"), t.Context()
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}
	if err := errors.Join(m.Create(ctx, id, mib), m.Publish(ctx, id, nil)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Observe(ctx, id); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("observed without a worker: %v", err)
	}
	e, err := m.Open(ctx, id, want)
	limits := blockdev.Limits{ReadIOPS: 5}
	if err := errors.Join(err, m.Throttle(ctx, id, limits)); err != nil {
		t.Fatal(err)
	}
	m.Restart(Restarted{})
	if s, err := m.Observe(ctx, id); err != nil || s.Kind != blockdev.NBD || s.Limits != limits {
		t.Errorf("observed %+v, %v", s, err)
	}
	if err := m.Die(id); err != nil {
		t.Fatal(err)
	}
	if err := m.Throttle(ctx, id, limits); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("throttled a dead worker: %v", err)
	}
	again, err := m.Open(ctx, id, want)
	if err != nil || again != e {
		t.Errorf("opened again as %+v, %v", again, err)
	}
	if s, err := m.Observe(ctx, id); err != nil || !s.Limits.None() {
		t.Errorf("a new worker: %+v, %v", s, err)
	}
}

// lifeOf performs every side effect once, in the order of Points.
func lifeOf(t *testing.T, m *Memory) error {
	t.Helper()
	ctx, src, dst, bad, snap := t.Context(), NewID("src"), NewID("vol"), NewID("vol"), NewID("snp")
	var e blockdev.Endpoint
	for _, step := range []func() error{
		func() error { return m.Create(ctx, src, mib) },
		func() error { return m.Publish(ctx, src, nil) },
		func() error { return m.Clone(ctx, dst, src, mib) },
		func() error { return m.Flatten(ctx, dst) },
		func() (err error) {
			e, err = m.Open(ctx, dst, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
			return err
		},
		func() error { return m.Grow(ctx, dst, 2*mib) },
		func() error { return m.Close(ctx, dst, e.Lease) },
		func() (err error) {
			if e, err = m.Open(ctx, dst, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}}); err != nil {
				return err
			}
			return m.Sever(ctx, dst)
		},
		func() error { return m.Publish(ctx, dst, nil) },
		func() error { return m.Describe(ctx, dst, nil) },
		func() error { _, err := m.Snapshot(ctx, snap, dst); return err },
		func() error { return m.Flatten(ctx, dst) },
		func() error { _, err := m.Trim(ctx, dst); return err },
		func() error { return m.Remove(ctx, dst) },
		func() error { return errors.Join(m.Create(ctx, bad, mib), m.Publish(ctx, bad, nil)) },
		func() error { m.Damage(bad); _, err := m.List(ctx); return err },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func TestMemoryStopsAtEveryPoint(t *testing.T) {
	seen := map[string]bool{}
	m := NewMemory()
	m.Layered = true
	m.Failpoint = func(point string) error { seen[point] = true; return nil }
	if err := lifeOf(t, m); err != nil {
		t.Fatal(err)
	}
	for _, name := range Points {
		for _, when := range []string{"before ", "after "} {
			if !seen[when+name] {
				t.Errorf("%q was not passed", when+name)
			}
			delete(seen, when+name)
			failAt(t, when+name, errors.New("refused"), false)
			failAt(t, when+name, ErrCrash, true)
		}
	}
	if len(seen) > 0 {
		t.Errorf("points that Points does not name: %v", seen)
	}
}

func failAt(t *testing.T, point string, injected error, dead bool) {
	t.Helper()
	m := NewMemory()
	m.Layered = true
	m.Failpoint = func(p string) error {
		if p == point {
			return injected
		}
		return nil
	}
	if err := lifeOf(t, m); !errors.Is(err, injected) {
		t.Fatalf("%s: %v, want %v", point, err, injected)
	}
	if _, err := m.Capacity(t.Context()); errors.Is(err, ErrCrash) != dead {
		t.Errorf("%s: then %v", point, err)
	}
	m.Failpoint = nil
	m.Restart(Restarted{LoseDrafts: true, LoseOpenings: true})
	infos, err := m.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range infos {
		if info.Draft || info.Open {
			t.Errorf("%s: after a power cut %+v", point, info)
		}
	}
}

func TestMemoryBeforeAndAfter(t *testing.T) {
	for _, when := range []string{"before ", "after "} {
		m, id := NewMemory(), NewID("vol")
		m.Failpoint = func(p string) error {
			if p == when+"create" {
				return ErrCrash
			}
			return nil
		}
		if err := m.Create(t.Context(), id, mib); !errors.Is(err, ErrCrash) {
			t.Fatal(err)
		}
		m.Restart(Restarted{})
		_, err := m.Stat(t.Context(), id)
		if happened := err == nil; happened != (when == "after ") {
			t.Errorf("a crash %screate: happened %v", when, happened)
		}
	}
}

func TestMemoryFull(t *testing.T) {
	m, id := NewMemory(), NewID("vol")
	m.SetTotal(3 * memoryBlockSize)
	if err := m.Create(t.Context(), id, mib); err != nil {
		t.Fatal(err)
	}
	image, err := m.Image("mem:" + string(id))
	if err != nil {
		t.Fatal(err)
	}
	n, err := image.WriteAt(make([]byte, 4*memoryBlockSize), 0)
	if !errors.Is(err, blockdev.ErrNoSpace) || n != 3*memoryBlockSize {
		t.Errorf("wrote %d, %v", n, err)
	}
	if err := m.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if c, err := m.Capacity(t.Context()); err != nil || c.Free != c.Total || c.Allocated != 0 {
		t.Errorf("after the removal: %+v, %v", c, err)
	}
}

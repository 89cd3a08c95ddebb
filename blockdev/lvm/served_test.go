package lvm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/control"
	"holdfast/internal/vmtest"
)

// workersFor gives workers that end with the test, and a directory for notes.
func workersFor(t *testing.T) (*control.Starter, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "w")
	good(t, err)
	s, err := control.New(control.Options{Program: vmtest.Program(blockd), Dir: filepath.Join(dir, "s"), Log: os.Stderr, DieWithParent: true})
	good(t, err)
	t.Cleanup(func() {
		ids, err := s.List(context.Background())
		good(t, err)
		for _, id := range ids {
			good(t, s.Kill(context.Background(), id))
		}
		good(t, os.RemoveAll(dir))
	})
	return s, filepath.Join(dir, "n")
}

func good(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// put writes a block through a client, durably; got reads it.
func put(t *testing.T, e blockdev.Endpoint, off int64, b byte) {
	t.Helper()
	c := blockdevtest.DialNBD(t, e.Path)
	_, err := c.WriteAt(bytes.Repeat([]byte{b}, 4096), off)
	good(t, errors.Join(err, c.Close()))
}

func got(t *testing.T, c blockdevtest.File, off int64, want byte) {
	t.Helper()
	b := make([]byte, 4096)
	_, err := c.ReadAt(b, off)
	if err != nil || !bytes.Equal(b, bytes.Repeat([]byte{want}, 4096)) {
		t.Errorf("at %d: %x, %v; want %x", off, b[:4], err, want)
	}
}

// onDevice reads a closed image by its block device.
func onDevice(t *testing.T, p *Pool, id blockdev.ID, blocks map[int64]byte) {
	t.Helper()
	e, err := p.Open(t.Context(), id, anyBlock)
	good(t, err)
	f, err := os.Open(e.Path)
	good(t, err)
	for off, want := range blocks {
		b := make([]byte, 4096)
		if _, err := f.ReadAt(b, off); err != nil || b[0] != want || b[4095] != want {
			t.Errorf("the device has %x at %d, %v; want %x", b[:4], off, err, want)
		}
	}
	f.Close()
	good(t, p.Close(t.Context(), id, e.Lease))
}

var byNBD = blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}

// TestServed: a thin volume is served by a worker that outlives the process which
// started it, is grown under clients, and is a block device again after Close.
func TestServed(t *testing.T) {
	p := sharedPlace(t)
	workers, notes := workersFor(t)
	p.o.Workers, p.o.Notes = workers, notes
	pool, ctx, id := p.open(t), t.Context(), blockdevtest.NewID(blockdev.PrefixVolume)
	good(t, pool.Create(ctx, id, 8<<20))
	good(t, pool.Publish(ctx, id, []byte("v")))

	e, err := pool.Open(ctx, id, byNBD)
	good(t, err)
	put(t, e, 0, 1)
	c := blockdevtest.DialNBD(t, e.Path)
	got(t, c, 0, 1)
	if s, err := pool.Observe(ctx, id); err != nil || s.Clients != 1 {
		t.Errorf("observed: %+v, %v", s, err)
	}
	if err := pool.Close(ctx, id, e.Lease); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("closed under a client: %v", err)
	}
	if _, err := pool.Open(ctx, id, anyBlock); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("opened as a block device beside: %v", err)
	}
	good(t, pool.Grow(ctx, id, 12<<20))
	put(t, e, 10<<20, 2)

	pool = p.open(t) // another process
	got(t, c, 0, 1)
	again, err := pool.Open(ctx, id, byNBD)
	good(t, err)
	if again.Lease != e.Lease || again.Path != e.Path || again.Size != 12<<20 {
		t.Errorf("found as %+v, was %+v", again, e)
	}
	if n, err := pool.Counters(ctx, id); err != nil || n.Writes < 2 {
		t.Errorf("counted %+v, %v", n, err)
	}
	w, err := workers.Find(ctx, id)
	good(t, err)
	good(t, w.Kill(ctx))
	good(t, pool.AwaitEnd(ctx, id))
	limited := blockdev.Want{Kinds: byNBD.Kinds, Limits: blockdev.Limits{ReadIOPS: 10000}}
	again, err = pool.Open(ctx, id, limited)
	good(t, err)
	if s, err := pool.Observe(ctx, id); err != nil || s.Limits != limited.Limits {
		t.Errorf("the next worker has limits %+v, %v", s.Limits, err)
	}
	if again.Lease != e.Lease || again.Path != e.Path {
		t.Errorf("after the worker was killed: %+v, was %+v", again, e)
	}
	put(t, again, 4096, 3)
	for range 2 {
		good(t, pool.Close(ctx, id, e.Lease))
	}
	onDevice(t, pool, id, map[int64]byte{0: 1, 4096: 3, 10 << 20: 2})

	e, err = pool.Open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.VhostUser, blockdev.NBD}, ReadOnly: true})
	good(t, err)
	if readOnly, err := pool.readOnly(imagePrefix + string(id)); err != nil || !readOnly || e.Kind != blockdev.VhostUser {
		t.Errorf("open as %+v, its device is read-only %t, %v", e, readOnly, err)
	}
	good(t, pool.Close(ctx, id, e.Lease))
	good(t, pool.Remove(ctx, id))
	if left, err := os.ReadDir(notes); err != nil || len(left) > 0 {
		t.Errorf("notes are left: %v, %v", left, err)
	}
}

// TestServedCut: an opening or its end that a crash cuts at any point is found by the
// next process, which ends it.
func TestServedCut(t *testing.T) {
	p := sharedPlace(t)
	var h hand
	p.o.fault = h.fault
	p.o.Workers, p.o.Notes = workersFor(t)
	pool, ctx, id := p.open(t), t.Context(), blockdevtest.NewID(blockdev.PrefixVolume)
	good(t, pool.Create(ctx, id, 4<<20))
	good(t, pool.Publish(ctx, id, []byte("v")))
	try := points(t, 2)
	for _, what := range []string{"open", "close"} {
		for n := 1; ; n++ {
			if n < 3 && !try(n) { // each has more than two
				continue
			}
			e, err := blockdev.Endpoint{}, error(nil)
			if what == "close" {
				e, err = pool.Open(ctx, id, byNBD)
				good(t, err)
				put(t, e, 0, byte(n))
			}
			k := &knife{at: n, dies: true}
			h.take(k)
			if what == "open" {
				e, err = pool.Open(ctx, id, byNBD)
			} else {
				err = pool.Close(ctx, id, e.Lease)
			}
			h.take(nil)
			if k.struck == "" {
				good(t, err)
				if n < 3 {
					t.Errorf("%s has %d points", what, n-1)
				}
			}
			pool = p.open(t)
			again, err := pool.Open(ctx, id, byNBD)
			if err != nil {
				t.Fatalf("%s, cut at %s: %v", what, k.struck, err)
			}
			put(t, again, 4096, byte(n))
			good(t, pool.Close(ctx, id, again.Lease))
			if left, err := os.ReadDir(p.o.Notes); err != nil || len(left) > 0 {
				t.Errorf("%s, cut at %s: notes are left: %v, %v", what, k.struck, left, err)
			}
			if active, err := pool.active(imagePrefix + string(id)); err != nil || active {
				t.Errorf("%s, cut at %s: active %t, %v", what, k.struck, active, err)
			}
			if k.struck == "" {
				break
			}
		}
	}
	onDevice(t, pool, id, map[int64]byte{})
	good(t, pool.Remove(ctx, id))
}

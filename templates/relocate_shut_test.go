package templates_test

import (
	"errors"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/pools"
	"holdfast/blockdev/sparse"
	"holdfast/templates"
)

// TestRelocateWhileAPoolIsShut: volumes in a pool that was shut during a relocation ask
// where the bytes are by now from the next start on at which it is open, though the first
// pool needs to be told nothing then; also when it moved back.
func TestRelocateWhileAPoolIsShut(t *testing.T) {
	f := newFarRig(t)
	var second *sparse.Pool
	shut, far := false, f.tune
	end := func() {
		if second != nil {
			second.Shutdown()
			second = nil
		}
	}
	t.Cleanup(end)
	f.tune = func(o *templates.Options) {
		far(o)
		other := pools.Pool{Name: "second", Err: errors.New("shut")}
		if !shut {
			var err error
			if second, err = sparse.Open(t.Context(), filepath.Join(f.rig.dir, "second"), sparse.Options{Log: o.Log, Workers: f.workers}); err != nil {
				t.Fatal(err)
			}
			other = pools.Pool{Name: "second", Backend: second}
		}
		set, err := pools.New(pools.Pool{Name: "home", Backend: f.pool}, other)
		if err != nil {
			t.Fatal(err)
		}
		o.Pool = set
	}
	f.reopen()
	name, files := f.publish("content")
	v, err := f.register(name, files.Digest)
	if err != nil {
		t.Fatal(err)
	}
	f.away.Store(true) // so that the second pool does not fetch all of it
	base, chunks, err := f.pool.RemoteBaseOf(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	err = errors.Join(second.CreateRemote(t.Context(), id, base), chunks.Close(), second.Publish(t.Context(), id, []byte("{}")))
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{f.below("moved", files), f.url + filepath.Base(files.Manifest)} {
		shut = true
		end()
		f.reopen()
		f.away.Store(false)
		moved, err := f.relocate("1", to)
		if err != nil {
			t.Fatal(err)
		}
		shut = false
		f.away.Store(true)
		f.reopen()
		now, chunks, err := second.RemoteBaseOf(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if err := chunks.Close(); err != nil || now.URL != moved.Remote.Image {
			t.Errorf("the version is at %s, and the second pool asks %s, %v", moved.Remote.Image, now.URL, err)
		}
	}
}

package sparse

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// TestSeverWhileAnotherOpens: somebody waits with the image's turn for a worker that does
// not answer. When that is killed he starts the next one, which is ended as well: nobody
// has the image then that could not be found again.
func TestSeverWhileAnotherOpens(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	p, err := Open(t.Context(), filepath.Join(blockdevtest.Ext4Dir(t), "pool"), Options{Host: "test", Rate: -1, Workers: workersFor(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Shutdown)
	ctx := t.Context()
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(p.Create(ctx, id, 1<<20), p.Publish(ctx, id, []byte("{}"))); err != nil {
		t.Fatal(err)
	}
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}
	if _, err = p.Open(ctx, id, want); err != nil {
		t.Fatal(err)
	}
	s, err := p.Observe(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	blockdevtest.StandStill(t, s.Pid)
	opened := make(chan error, 1)
	go func() { _, err := p.Open(ctx, id, want); opened <- err }()
	await(t, "the other has the turn", func() bool {
		soon, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		done, err := p.turns.take(soon, id)
		if err == nil {
			done()
		}
		return err != nil
	})
	bounded, cancel := context.WithTimeout(ctx, 15*time.Second) // a third of it goes by gently
	defer cancel()
	if err := p.Sever(bounded, id); err != nil {
		t.Error(err)
	}
	if err := <-opened; err != nil {
		t.Errorf("the other: %v", err)
	}
	e, err := p.Open(ctx, id, want)
	if err == nil {
		err = p.Close(ctx, id, e.Lease)
	}
	if err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

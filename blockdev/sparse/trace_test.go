package sparse

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/control"
)

// noting notes what workers are started with.
type noting struct {
	Workers
	specs []control.Spec
}

func (n *noting) Serve(ctx context.Context, spec control.Spec) (*control.Worker, error) {
	n.specs = append(n.specs, spec)
	return n.Workers.Serve(ctx, spec)
}

// TestTrace: what the first volume of a base wanted is copied first for the next.
func TestTrace(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	workers := &noting{Workers: workersFor(t)}
	p, err := Open(ctx, filepath.Join(blockdevtest.Ext4Dir(t), "pool"), Options{Host: "test", Rate: -1, Workers: workers})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Shutdown()
	src := blockdevtest.NewID(blockdev.PrefixSource)
	const size, chunk = 16 << 20, 1 << 20
	if err := p.Create(ctx, src, size); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.draft(src)+"/"+imageFile, bytes.Repeat([]byte("source"), size/6+1)[:size], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Publish(ctx, src, nil); err != nil {
		t.Fatal(err)
	}
	// A reader, so that nothing is copied in the background and each read is a miss.
	clone := func() blockdev.ID {
		t.Helper()
		id := blockdevtest.NewID(blockdev.PrefixVolume)
		if err := errors.Join(p.Clone(ctx, id, src, size), p.Publish(ctx, id, nil)); err != nil {
			t.Fatal(err)
		}
		return id
	}
	read := func(id blockdev.ID, chunks ...int64) {
		t.Helper()
		e, err := p.Open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}, ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		f := blockdevtest.DialNBD(t, e.Path)
		b := make([]byte, 4096)
		for _, c := range chunks {
			if _, err := f.ReadAt(b, c*chunk); err != nil {
				t.Error(err)
			}
		}
		if err := errors.Join(f.Close(), p.Close(ctx, id, e.Lease)); err != nil {
			t.Fatal(err)
		}
	}
	use := func(chunks ...int64) {
		t.Helper()
		read(clone(), chunks...)
	}
	wanted := func(what string, chunks ...int64) {
		t.Helper()
		if got := workers.specs[len(workers.specs)-1].Trace; !slices.Equal(got, chunks) {
			t.Errorf("%s: a worker was given %v", what, got)
		}
	}
	use()
	wanted("the first")
	use(9, 3, 9)
	wanted("after one that read nothing")
	use(5)
	wanted("after one that read", 9, 3)
	use()
	wanted("after one that read something else", 9, 3)
	if err := os.WriteFile(p.image(src)+"/"+traceFile, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	use(7)
	wanted("of garbage")
	use()
	wanted("after garbage", 7)
	// It goes with its image, and a base that is gone keeps nobody from working.
	last := clone()
	if err := p.Remove(ctx, src); err != nil {
		t.Fatal(err)
	}
	read(last, 2)
	wanted("of a base that is gone")
}

package templates_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/sparse"
	"holdfast/templates"
)

// devices is a pool whose images are devices for who reads them, as those of a volume
// group are, and of which none can be cloned.
type devices struct{ *sparse.Pool }

func (d devices) Open(ctx context.Context, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
	if w.ReadOnly { // they are made as files
		w.Kinds = slices.DeleteFunc(slices.Clone(w.Kinds), func(k blockdev.Kind) bool { return k == blockdev.File })
	}
	return d.Pool.Open(ctx, id, w)
}

func (d devices) Clone(context.Context, blockdev.ID, blockdev.ID, int64) error {
	return errors.ErrUnsupported
}

// stuck is a reader that takes nothing until it is let go.
type stuck struct {
	begun chan struct{}
	going chan struct{}
}

func (s stuck) Write(p []byte) (int, error) {
	select {
	case s.begun <- struct{}{}:
	default:
	}
	<-s.going
	return len(p), nil
}

// TestLentDevicesHoldUpNobody: while somebody takes an image slowly that is a device,
// volumes are made of it, and others take it, too; the last one closes it.
func TestLentDevicesHoldUpNobody(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	r := plainRig(t, func(o *templates.Options) { o.Pool = devices{o.Pool.(*sparse.Pool)} })
	ctx := t.Context()
	r.put("app")
	v := r.push("app", pack(t, file("file", "content")))
	p := templates.Publication{SizeMiB: 64}
	publish := func(w io.Writer) error {
		return r.Publish(ctx, workspace, "app", p, func(templates.Revision) io.Writer { return w })
	}
	s := stuck{make(chan struct{}, 1), make(chan struct{})}
	slow := make(chan error)
	go func() { slow <- publish(s) }()
	<-s.begun
	// All of this would wait for the slow one.
	if err := publish(io.Discard); err != nil {
		t.Error(err)
	}
	spec := templates.SourceSpec{Filesystem: filesystem.Ext4, Size: 64 * mib, Revision: v.ID}
	if err := r.Hydrate(ctx, blockdevtest.NewID(blockdev.PrefixVolume), spec); err != nil {
		t.Error(err)
	}
	close(s.going)
	if err := <-slow; err != nil {
		t.Errorf("the slow one: %v", err)
	}
	infos, err := r.pool.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range infos {
		if info.Open {
			t.Errorf("%s stays open", info.ID)
		}
	}
}

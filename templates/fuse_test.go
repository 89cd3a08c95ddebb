package templates_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/sparse"
	"holdfast/metadata"
)

var errCrash = errors.New("crash")

// fuse blows at the n-th point between two side effects. After that nothing
// has an effect any more: the process is dead.
type fuse struct {
	mu    sync.Mutex
	at    int  // 0: never
	once  bool // only this one call fails: an error, not a crash
	seen  int
	blown bool
	where string
}

func (f *fuse) failpoint(point string) error {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.blown && !f.once {
		return errCrash
	}
	f.seen++
	if f.seen == f.at {
		f.blown, f.where = true, point
		return fmt.Errorf("%w at %s", errCrash, point)
	}
	return nil
}

// around runs a side effect with a point before and one after it.
func (f *fuse) around(name string, effect func() error) error {
	if err := f.failpoint("before " + name); err != nil {
		return err
	}
	if err := effect(); err != nil {
		return err
	}
	return f.failpoint("after " + name)
}

func (f *fuse) reading() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.blown && !f.once {
		return errCrash
	}
	return nil
}

type fusedPool struct {
	p *sparse.Pool
	f *fuse
}

func (p *fusedPool) Create(ctx context.Context, id blockdev.ID, size int64) error {
	return p.f.around("Create "+string(id[:3]), func() error { return p.p.Create(ctx, id, size) })
}

func (p *fusedPool) Clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	return p.f.around("Clone", func() error { return p.p.Clone(ctx, dst, src, size) })
}

func (p *fusedPool) CreateRemote(ctx context.Context, id blockdev.ID, base blockdev.RemoteBase) error {
	return p.f.around("CreateRemote", func() error { return p.p.CreateRemote(ctx, id, base) })
}

func (p *fusedPool) HoldsRemote() bool { return p.p.HoldsRemote() }

func (p *fusedPool) RemoteBaseOf(ctx context.Context, id blockdev.ID) (blockdev.RemoteBase, io.Closer, error) {
	return p.p.RemoteBaseOf(ctx, id)
}

func (p *fusedPool) SetAddress(ctx context.Context, id blockdev.ID, base blockdev.RemoteBase) error {
	return p.f.around("SetAddress", func() error { return p.p.SetAddress(ctx, id, base) })
}

func (p *fusedPool) Access(ctx context.Context, id blockdev.ID, readOnly bool) (blockdev.Bytes, error) {
	if err := p.f.failpoint("before Access"); err != nil {
		return nil, err
	}
	return p.p.Access(ctx, id, readOnly)
}

func (p *fusedPool) Publish(ctx context.Context, id blockdev.ID, d []byte) error {
	return p.f.around("Publish "+string(id[:3]), func() error { return p.p.Publish(ctx, id, d) })
}

func (p *fusedPool) Describe(ctx context.Context, id blockdev.ID, d []byte) error {
	return p.f.around("Describe", func() error { return p.p.Describe(ctx, id, d) })
}

func (p *fusedPool) Grow(ctx context.Context, id blockdev.ID, size int64) error {
	return p.f.around("Grow", func() error { return p.p.Grow(ctx, id, size) })
}

func (p *fusedPool) Open(ctx context.Context, id blockdev.ID, w blockdev.Want) (e blockdev.Endpoint, err error) {
	err = p.f.around("Open", func() error { e, err = p.p.Open(ctx, id, w); return err })
	return e, err
}

func (p *fusedPool) Close(ctx context.Context, id blockdev.ID, lease string) error {
	return p.f.around("Close", func() error { return p.p.Close(ctx, id, lease) })
}

func (p *fusedPool) Remove(ctx context.Context, id blockdev.ID) error {
	return p.f.around("Remove "+string(id[:3]), func() error { return p.p.Remove(ctx, id) })
}

func (p *fusedPool) Stat(ctx context.Context, id blockdev.ID) (blockdev.Info, error) {
	if err := p.f.reading(); err != nil {
		return blockdev.Info{}, err
	}
	return p.p.Stat(ctx, id)
}

func (p *fusedPool) List(ctx context.Context) ([]blockdev.Info, error) { return p.p.List(ctx) }

func (p *fusedPool) Quarantined(ctx context.Context) ([]blockdev.Quarantine, error) {
	return p.p.Quarantined(ctx)
}

func (p *fusedPool) Capacity(ctx context.Context) (blockdev.Capacity, error) {
	return p.p.Capacity(ctx)
}

type fusedLog struct {
	l *metadata.SideLog
	f *fuse
}

func (l *fusedLog) Append(kind, key string, value any) error {
	return l.f.around("Append", func() error { return l.l.Append(kind, key, value) })
}

func (l *fusedLog) Each(kind string, fn func(string, []byte) error) error { return l.l.Each(kind, fn) }

type fusedTools struct {
	t filesystem.Tools
	f *fuse
}

func (x *fusedTools) Make(ctx context.Context, path string, t filesystem.Type, o filesystem.MakeOptions) error {
	return x.f.around("Make", func() error { return x.t.Make(ctx, path, t, o) })
}

func (x *fusedTools) Grow(ctx context.Context, path string, t filesystem.Type) error {
	return x.f.around("Grow filesystem", func() error { return x.t.Grow(ctx, path, t) })
}

func (x *fusedTools) SizeIn(ctx context.Context, image io.ReaderAt, t filesystem.Type) (int64, error) {
	return x.t.SizeIn(ctx, image, t)
}

func (x *fusedTools) IdentifyIn(ctx context.Context, image filesystem.Image, size int64, t filesystem.Type, uuid string) error {
	return x.t.IdentifyIn(ctx, image, size, t, uuid)
}

func (x *fusedTools) Check(ctx context.Context, path string, t filesystem.Type, repair bool) error {
	return x.f.around("Check", func() error { return x.t.Check(ctx, path, t, repair) })
}

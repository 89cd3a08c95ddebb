package engine

import (
	"context"
	"errors"
	"io"
	"maps"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
	"holdfast/templates"
)

// The toy filesystem's files are whatever a test writes behind its superblock; a
// file that was removed is free space that only a trim gives back. removed says
// up to which byte of a volume.

func (f toyFS) Usage(_ context.Context, path string, _ filesystem.Type) (filesystem.Usage, error) {
	s, err := readToy(f.w.pool, path)
	return filesystem.Usage{Total: s.size, Used: toyBytes, Free: s.size - toyBytes}, err
}

func (f toyFS) UsageIn(ctx context.Context, image io.ReaderAt, t filesystem.Type) (filesystem.Usage, error) {
	size, err := f.SizeIn(ctx, image, t)
	return filesystem.Usage{Total: size, Used: toyBytes, Free: size - toyBytes}, err
}

func (f toyFS) UsageMounted(ctx context.Context, dir string, t filesystem.Type) (filesystem.Usage, error) {
	return f.Usage(ctx, "mem:"+dir, t)
}

func (f toyFS) SyncMounted(_ context.Context, dir string, _ filesystem.Type) error {
	if f.w.kernel.isFrozen(dir) {
		return errors.New("a flush of a frozen filesystem may wait for ever")
	}
	return f.w.point("sync")
}

func (f toyFS) TrimMounted(_ context.Context, dir string, _ filesystem.Type, from, length int64) (filesystem.Trimmed, error) {
	image, err := f.w.pool.Image("mem:" + dir)
	if err != nil {
		return filesystem.Trimmed{}, err
	}
	if f.w.betweenTrims != nil {
		f.w.betweenTrims()
	}
	length = min(length, f.w.trimPiece)
	err = f.w.effect("trim", func() { image.Punch(max(from, 4096), length) })
	return filesystem.Trimmed{Discarded: length, Next: from + length, Done: from+length >= image.Size()}, err
}

func (f toyFS) Recovers(context.Context, string, filesystem.Type) (bool, error) {
	return f.w.journal, nil
}

func (f toyFS) Freeze(dir string) error {
	k := f.w.kernel
	if k.isFrozen(dir) {
		return filesystem.ErrFrozen
	}
	return f.w.effect("freeze", func() { k.setFrozen(dir, true) })
}

func (f toyFS) Thaw(dir string) error {
	if !f.w.kernel.isFrozen(dir) {
		return nil
	}
	return f.w.effect("thaw", func() { f.w.kernel.setFrozen(dir, false) })
}

func (k *kernel) isFrozen(dir string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.frozen[dir]
}

func (k *kernel) setFrozen(dir string, frozen bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if frozen {
		k.frozen[dir] = true
		return
	}
	delete(k.frozen, dir)
}

func (k *kernel) frozenNow() map[string]bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maps.Clone(k.frozen)
}

func (k *kernel) Volumes(context.Context) (map[blockdev.ID]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := map[blockdev.ID]string{}
	for id := range k.mounts {
		all[id] = string(id)
	}
	return all, nil
}

// limiter keeps rules as the kernel does: by device, whoever has that later.
type limiter struct{ w *world }

func (l limiter) Explain(t attach.Target, _ bool) (blockdev.Enforcement, error) {
	if t.Path == "/cannot" {
		return blockdev.Enforcement{}, errors.ErrUnsupported
	}
	return blockdev.Enforcement{Mechanism: "toy", Gaps: []string{"nothing"}}, nil
}

func (l limiter) Apply(_ context.Context, device string, t attach.Target, _ bool, limits blockdev.Limits) error {
	return l.w.effect("limit", func() {
		k := l.w.kernel
		k.mu.Lock()
		defer k.mu.Unlock()
		if limits.None() {
			delete(k.limits, device+"|"+t.Container)
			return
		}
		k.limits[device+"|"+t.Container] = limits
	})
}

// verifyLimits: each rule is some living attachment's, and each attachment's
// limits hold.
func (w *world) verifyLimits(t testing.TB, all []Volume) {
	t.Helper()
	w.kernel.mu.Lock()
	rules := maps.Clone(w.kernel.limits)
	w.kernel.mu.Unlock()
	for _, v := range all {
		for _, a := range v.Attachments {
			if isSocket(a.Kind) {
				if s, err := w.pool.Observe(context.Background(), v.ID); err != nil || s.Limits != a.Limits {
					t.Errorf("attachment %s to %s has limits %+v, and its worker %+v: %v", a.ID, a.Holder, a.Limits, s.Limits, err)
				}
				continue
			}
			key := "mem:" + string(v.ID) + "|" + a.Target.Container
			if have := rules[key]; have != a.Limits {
				t.Errorf("attachment %s to %s has limits %+v, and these hold: %+v", a.ID, a.Holder, a.Limits, have)
			}
			delete(rules, key)
		}
	}
	if len(rules) > 0 {
		t.Errorf("limits of nobody: %+v", rules)
	}
}

// Capture reads a clone as the real library does, with a draft of a source that
// boot removes if it is left.
func (l shelves) Capture(ctx context.Context, workspace string, c templates.Capture) (out templates.Captured, err error) {
	draft := newID(blockdev.PrefixSource, l.w.now())
	err = c.Clone(ctx, draft)
	defer func() {
		if l.w.pool.Remove(ctx, draft) != nil {
			err = errors.Join(err, l.w.pool.Remove(ctx, draft))
		}
	}()
	if err != nil {
		return out, err
	}
	if l.w.captured != nil {
		l.w.captured(draft)
	}
	err = l.w.effect("build", func() {
		out.Revision = templates.Revision{Workspace: workspace, Template: c.Template, Name: "1", Number: 1, Status: templates.Ready}
	})
	return out, err
}

func (l shelves) Copy(ctx context.Context, dst, src blockdev.ID, size int64) error {
	if err := l.w.pool.Create(ctx, dst, size); err != nil {
		return err
	}
	from, err := l.w.pool.Image("mem:" + string(src))
	if err != nil {
		return err
	}
	to, err := l.w.pool.Image("mem:" + string(dst))
	if err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	if _, err = from.ReadAt(b, 0); err == nil {
		_, err = to.WriteAt(b, 0)
	}
	return err
}

// openLibrary removes the drafts that a crash left, as templates.Open does.
func (w *world) openLibrary() {
	w.t.Helper()
	images, err := w.pool.List(context.Background())
	for _, info := range images {
		if info.Draft && strings.HasPrefix(string(info.ID), blockdev.PrefixSource) {
			err = errors.Join(err, w.pool.Remove(context.Background(), info.ID))
		}
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

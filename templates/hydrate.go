package templates

import (
	"context"
	"errors"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
)

// Hydrate makes a draft dst of exactly s.Size bytes that holds a clean
// filesystem: a clone of the source for s, which may be layered, or where the pool can
// do neither a copy of its data. A draft that is there is made anew. The draft has the
// source's UUID until it is given its own. ErrTooSmall when the revision does
// not fit.
func (l *Library) Hydrate(ctx context.Context, dst blockdev.ID, s SourceSpec) error {
	if v := l.remoteOf(s.Revision); v != nil {
		return l.hydrateRemote(ctx, dst, s, *v)
	}
	src, release, err := l.Source(ctx, s)
	if err != nil {
		return err
	}
	defer release()
	if cloner, ok := l.o.Pool.(blockdev.Cloner); ok {
		if err := cloner.Clone(ctx, dst, src, s.Size); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return l.copyData(ctx, dst, src, s.Size)
}

// cloneFlat makes a draft that is a clone in one file: images that others are made of
// are never layered. errors.ErrUnsupported where that takes a copy.
func (l *Library) cloneFlat(ctx context.Context, dst, src blockdev.ID, size int64) error {
	cloner, ok := l.o.Pool.(blockdev.Cloner)
	if !ok {
		return errors.ErrUnsupported
	}
	if err := cloner.Clone(ctx, dst, src, size); err != nil {
		return err
	}
	info, err := l.o.Pool.Stat(ctx, dst)
	if err == nil && info.Layers > 0 {
		return errors.ErrUnsupported
	}
	return err
}

// copyData makes a draft with the data of a published image.
func (l *Library) copyData(ctx context.Context, dst, src blockdev.ID, size int64) error {
	if err := l.o.Pool.Create(ctx, dst, size); err != nil {
		return err
	}
	defer l.openings.lock(string(src)).Unlock()
	readOnly := blockdev.Want{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}, ReadOnly: true}
	return l.withEndpoint(ctx, src, readOnly, func(from string) error {
		return l.withFile(ctx, dst, func(to string) error { return copyImage(ctx, to, from, extent.Copy) })
	})
}

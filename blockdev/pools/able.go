package pools

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
)

// able does something that only some backends can where an image is.
func able[T any](ctx context.Context, s *Set, id blockdev.ID, do func(T) error) error {
	b, err := s.find(ctx, id)
	if err != nil {
		return err
	}
	can, ok := b.(T)
	if !ok {
		return errors.ErrUnsupported
	}
	return do(can)
}

// Clone implements blockdev.Cloner.
func (s *Set) Clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	s.settle(dst)
	from, err := s.find(ctx, src)
	if err != nil {
		return err
	}
	return able(ctx, s, dst, func(to blockdev.Cloner) error {
		if any(to) != any(from) {
			return fmt.Errorf("%s and %s are in different pools: %w", dst, src, errors.ErrUnsupported)
		}
		return to.Clone(ctx, dst, src, size)
	})
}

// CanSever implements blockdev.Severer.
func (s *Set) CanSever(ctx context.Context, id blockdev.ID) error {
	return able(ctx, s, id, func(b blockdev.Severer) error { return b.CanSever(ctx, id) })
}

// Sever implements blockdev.Severer.
func (s *Set) Sever(ctx context.Context, id blockdev.ID) error {
	return able(ctx, s, id, func(b blockdev.Severer) error { return b.Sever(ctx, id) })
}

// Trim implements blockdev.Trimmer.
func (s *Set) Trim(ctx context.Context, id blockdev.ID) (freed int64, err error) {
	err = able(ctx, s, id, func(b blockdev.Trimmer) error { freed, err = b.Trim(ctx, id); return err })
	return freed, err
}

// Counters implements blockdev.Meter.
func (s *Set) Counters(ctx context.Context, id blockdev.ID) (c blockdev.Counters, err error) {
	err = able(ctx, s, id, func(b blockdev.Meter) error { c, err = b.Counters(ctx, id); return err })
	return c, err
}

// Exclusive implements blockdev.Accountant.
func (s *Set) Exclusive(ctx context.Context, id blockdev.ID) (bytes int64, err error) {
	err = able(ctx, s, id, func(b blockdev.Accountant) error { bytes, err = b.Exclusive(ctx, id); return err })
	return bytes, err
}

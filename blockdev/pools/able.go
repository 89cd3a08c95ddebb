package pools

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
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

// CreateRemote implements blockdev.RemoteCreator.
func (s *Set) CreateRemote(ctx context.Context, id blockdev.ID, base blockdev.RemoteBase) error {
	s.settle(id)
	return able(ctx, s, id, func(b blockdev.RemoteCreator) error { return b.CreateRemote(ctx, id, base) })
}

// HoldsRemote implements blockdev.RemoteCreator: of the home.
func (s *Set) HoldsRemote() bool { return s.all[0].holdsRemote() }

func (p Pool) holdsRemote() bool {
	creator, ok := p.Backend.(blockdev.RemoteCreator)
	return ok && creator.HoldsRemote()
}

// RemoteBaseOf implements blockdev.RemoteCreator.
func (s *Set) RemoteBaseOf(ctx context.Context, id blockdev.ID) (base blockdev.RemoteBase, chunks io.Closer, err error) {
	err = able(ctx, s, id, func(b blockdev.RemoteCreator) error { base, chunks, err = b.RemoteBaseOf(ctx, id); return err })
	return base, chunks, err
}

// SetAddress implements blockdev.RemoteCreator: in all pools that can have such images.
func (s *Set) SetAddress(ctx context.Context, id blockdev.ID, base blockdev.RemoteBase) error {
	var errs []error
	told := false
	for _, p := range s.all {
		if p.holdsRemote() {
			told = true
			errs = append(errs, p.Backend.(blockdev.RemoteCreator).SetAddress(ctx, id, base)) //nolint:forcetypeassert // it holds them
		}
	}
	if !told {
		return errors.ErrUnsupported
	}
	return errors.Join(errs...)
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

// Snapshot implements blockdev.Snapshotter: a snapshot that nobody placed is where its
// image is, and it can be nowhere else.
func (s *Set) Snapshot(ctx context.Context, snap, of blockdev.ID) (held time.Duration, err error) {
	from, err := s.find(ctx, of)
	if err != nil {
		return 0, err
	}
	if _, ok := s.known(snap); !ok {
		i, ok := s.known(of)
		if !ok { // find looked everywhere: at home
			i = 0
		}
		s.put(snap, i)
	}
	err = able(ctx, s, snap, func(to blockdev.Snapshotter) error {
		if any(to) != any(from) {
			return fmt.Errorf("%s and %s are in different pools: %w", snap, of, errors.ErrUnsupported)
		}
		held, err = to.Snapshot(ctx, snap, of)
		return err
	})
	return held, err
}

// Flatten implements blockdev.Flattener. Where no image is layered each is flat.
func (s *Set) Flatten(ctx context.Context, id blockdev.ID) error {
	b, err := s.find(ctx, id)
	if err != nil {
		return err
	}
	if f, ok := b.(blockdev.Flattener); ok {
		return f.Flatten(ctx, id)
	}
	_, err = b.Stat(ctx, id)
	return err
}

// IsLayered implements blockdev.FlatWatcher.
func (s *Set) IsLayered(ctx context.Context, id blockdev.ID) (layered, open bool, err error) {
	b, err := s.find(ctx, id)
	if err != nil {
		return false, false, err
	}
	if w, ok := b.(blockdev.FlatWatcher); ok {
		return w.IsLayered(ctx, id)
	}
	info, err := b.Stat(ctx, id)
	return info.Layers > 0, info.Open, err
}

// OnFlat implements blockdev.FlatWatcher. Where no image is layered none becomes flat.
func (s *Set) OnFlat(fn func(id blockdev.ID)) {
	for _, p := range s.all {
		if w, ok := p.Backend.(blockdev.FlatWatcher); ok {
			w.OnFlat(fn)
		}
	}
}

// ServesLayers implements blockdev.LayerServer.
func (s *Set) ServesLayers(ctx context.Context, id blockdev.ID) error {
	return able(ctx, s, id, func(b blockdev.LayerServer) error { return b.ServesLayers(ctx, id) })
}

// Access implements blockdev.Accessor.
func (s *Set) Access(ctx context.Context, id blockdev.ID, readOnly bool) (bytes blockdev.Bytes, err error) {
	err = able(ctx, s, id, func(b blockdev.Accessor) error { bytes, err = b.Access(ctx, id, readOnly); return err })
	return bytes, err
}

// Observe implements serve.Observer. Where no worker serves anything there is none.
func (s *Set) Observe(ctx context.Context, id blockdev.ID) (service serve.Service, err error) {
	err = able(ctx, s, id, func(b serve.Observer) error { service, err = b.Observe(ctx, id); return err })
	return service, noWorker("pools.Observe", id, err)
}

// AwaitEnd implements serve.Sentry.
func (s *Set) AwaitEnd(ctx context.Context, id blockdev.ID) error {
	err := able(ctx, s, id, func(b serve.Sentry) error { return b.AwaitEnd(ctx, id) })
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// Revive implements serve.Reviver.
func (s *Set) Revive(ctx context.Context, id blockdev.ID, lease string) error {
	err := able(ctx, s, id, func(b serve.Reviver) error { return b.Revive(ctx, id, lease) })
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// Throttle implements serve.Throttler.
func (s *Set) Throttle(ctx context.Context, id blockdev.ID, limits blockdev.Limits) error {
	err := able(ctx, s, id, func(b serve.Throttler) error { return b.Throttle(ctx, id, limits) })
	return noWorker("pools.Throttle", id, err)
}

// Expose implements serve.Exposer.
func (s *Set) Expose(ctx context.Context, id blockdev.ID, e serve.Exposure) error {
	err := able(ctx, s, id, func(b serve.Exposer) error { return b.Expose(ctx, id, e) })
	return noWorker("pools.Expose", id, err)
}

// Withdraw implements serve.Exposer.
func (s *Set) Withdraw(ctx context.Context, id blockdev.ID, name string, force bool) error {
	err := able(ctx, s, id, func(b serve.Exposer) error { return b.Withdraw(ctx, id, name, force) })
	if errors.Is(err, errors.ErrUnsupported) { // nothing is exposed there
		return nil
	}
	return err
}

func noWorker(op string, id blockdev.ID, err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		return blockdev.Op(op, id, fmt.Errorf("%w: its pool has no workers", blockdev.ErrNotFound))
	}
	return err
}

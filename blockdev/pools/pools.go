package pools

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"holdfast/blockdev"
)

// Pool is one pool of the host.
type Pool struct {
	Name    string
	Kind    string // of its backend: "sparse", "lvm"
	Backend blockdev.Backend
	Err     error // why it is not open; Backend is nil then
}

// Set is the pools of a host as one backend. It is safe for concurrent use.
type Set struct {
	all     []Pool // the home first
	trouble func(pool string, err error)

	mu sync.RWMutex
	at map[blockdev.ID]int // places in all; -1: in none of them
}

// New makes a set; the first pool is the home. ErrInvalid for names that are twice
// there, or a home that is not open.
func New(all ...Pool) (*Set, error) {
	for i, p := range all {
		if slices.ContainsFunc(all[:i], func(o Pool) bool { return o.Name == p.Name }) {
			return nil, blockdev.Op("pools.New", "", fmt.Errorf("%w: two pools are called %q", blockdev.ErrInvalid, p.Name))
		}
		if p.Backend == nil && p.Err == nil {
			return nil, blockdev.Op("pools.New", "", fmt.Errorf("%w: pool %q is neither open nor failed", blockdev.ErrInvalid, p.Name))
		}
	}
	if len(all) == 0 || all[0].Backend == nil {
		return nil, blockdev.Op("pools.New", "", fmt.Errorf("%w: the first pool must be open", blockdev.ErrInvalid))
	}
	return &Set{all: all, at: map[blockdev.ID]int{}, trouble: func(string, error) {}}, nil
}

// OnTrouble has fn told when a pool besides the home does not answer a question that
// the others are asked as well: they go on without it. Before the set is used.
func (s *Set) OnTrouble(fn func(pool string, err error)) { s.trouble = fn }

// All are the pools, the home first.
func (s *Set) All() []Pool { return slices.Clone(s.all) }

// Place says in which pool an image that is to be made, or was made in another
// life, is; "" is the home. ErrUnavailable for a pool that the host does not have:
// all that is asked of the image answers that, too.
func (s *Set) Place(id blockdev.ID, pool string) error {
	i := 0
	if pool != "" {
		i = slices.IndexFunc(s.all, func(p Pool) bool { return p.Name == pool })
	}
	s.put(id, i)
	if i < 0 {
		return blockdev.Op("pools.Place", id, fmt.Errorf("%w: this host has no pool %q", blockdev.ErrUnavailable, pool))
	}
	return nil
}

func (s *Set) put(id blockdev.ID, i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at[id] = i
}

func (s *Set) known(id blockdev.ID) (int, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	i, ok := s.at[id]
	return i, ok
}

// In is a pool's own backend; "" is the home.
func (s *Set) In(pool string) (blockdev.Backend, error) {
	if pool == "" {
		return s.all[0].Backend, nil
	}
	for _, p := range s.all {
		if p.Name == pool {
			return p.open()
		}
	}
	return nil, fmt.Errorf("%w: this host has no pool %q", blockdev.ErrUnavailable, pool)
}

// open gives the pool's backend. Why it is not open is the operator's to know, who is
// told at the start: what was wrong with the pool is nothing wrong with a request.
func (p Pool) open() (blockdev.Backend, error) {
	if p.Backend == nil {
		return nil, fmt.Errorf("%w: pool %q", blockdev.ErrUnavailable, p.Name)
	}
	return p.Backend, nil
}

// find gives the backend that has an image, or is to have it.
func (s *Set) find(ctx context.Context, id blockdev.ID) (blockdev.Backend, error) {
	i, ok := s.known(id)
	switch {
	case ok && i < 0:
		return nil, fmt.Errorf("%w: this host has no pool of its name", blockdev.ErrUnavailable)
	case ok:
		return s.all[i].open()
	}
	for i, p := range s.all[1:] {
		if p.Backend == nil {
			continue
		}
		_, err := p.Backend.Stat(ctx, id)
		if err == nil {
			s.put(id, i+1)
			return p.Backend, nil
		}
		if !errors.Is(err, blockdev.ErrNotFound) {
			s.trouble(p.Name, err)
		}
	}
	return s.all[0].Backend, nil
}

// settle puts an image that is about to be made, and that nobody has placed, at home.
func (s *Set) settle(id blockdev.ID) {
	if _, ok := s.known(id); !ok {
		s.put(id, 0)
	}
}

// with does something where an image is.
func (s *Set) with(ctx context.Context, id blockdev.ID, do func(blockdev.Backend) error) error {
	b, err := s.find(ctx, id)
	if err != nil {
		return err
	}
	return do(b)
}

// Create implements blockdev.Backend.
func (s *Set) Create(ctx context.Context, id blockdev.ID, size int64) error {
	s.settle(id)
	return s.with(ctx, id, func(b blockdev.Backend) error { return b.Create(ctx, id, size) })
}

// Publish implements blockdev.Backend.
func (s *Set) Publish(ctx context.Context, id blockdev.ID, description []byte) error {
	return s.with(ctx, id, func(b blockdev.Backend) error { return b.Publish(ctx, id, description) })
}

// Describe implements blockdev.Backend.
func (s *Set) Describe(ctx context.Context, id blockdev.ID, description []byte) error {
	return s.with(ctx, id, func(b blockdev.Backend) error { return b.Describe(ctx, id, description) })
}

// Grow implements blockdev.Backend.
func (s *Set) Grow(ctx context.Context, id blockdev.ID, size int64) error {
	return s.with(ctx, id, func(b blockdev.Backend) error { return b.Grow(ctx, id, size) })
}

// Open implements blockdev.Backend.
func (s *Set) Open(ctx context.Context, id blockdev.ID, w blockdev.Want) (e blockdev.Endpoint, err error) {
	err = s.with(ctx, id, func(b blockdev.Backend) error { e, err = b.Open(ctx, id, w); return err })
	return e, err
}

// Close implements blockdev.Backend.
func (s *Set) Close(ctx context.Context, id blockdev.ID, lease string) error {
	return s.with(ctx, id, func(b blockdev.Backend) error { return b.Close(ctx, id, lease) })
}

// Remove implements blockdev.Backend. The image's place is forgotten with it.
func (s *Set) Remove(ctx context.Context, id blockdev.ID) error {
	err := s.with(ctx, id, func(b blockdev.Backend) error { return b.Remove(ctx, id) })
	if err == nil {
		s.mu.Lock()
		delete(s.at, id)
		s.mu.Unlock()
	}
	return err
}

// Stat implements blockdev.Backend.
func (s *Set) Stat(ctx context.Context, id blockdev.ID) (info blockdev.Info, err error) {
	err = s.with(ctx, id, func(b blockdev.Backend) error { info, err = b.Stat(ctx, id); return err })
	return info, err
}

// List implements blockdev.Backend: the images of all open pools, each with the
// pool that it is in. One that two pools have is listed twice. A pool besides the home
// that does not answer is left out.
func (s *Set) List(ctx context.Context) ([]blockdev.Info, error) {
	var all []blockdev.Info
	for i, p := range s.all {
		if p.Backend == nil {
			continue
		}
		infos, err := p.Backend.List(ctx)
		if err != nil && i > 0 {
			s.trouble(p.Name, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, info := range infos {
			if i > 0 {
				info.Pool = p.Name
			}
			if _, ok := s.known(info.ID); !ok {
				s.put(info.ID, i)
			}
			all = append(all, info)
		}
	}
	return all, nil
}

// Quarantined implements blockdev.Backend, with the pools that answer.
func (s *Set) Quarantined(ctx context.Context) (all []blockdev.Quarantine, err error) {
	for i, p := range s.all {
		if p.Backend == nil {
			continue
		}
		found, err := p.Backend.Quarantined(ctx)
		if err != nil && i > 0 {
			s.trouble(p.Name, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

// Capacity implements blockdev.Backend: the home's.
func (s *Set) Capacity(ctx context.Context) (blockdev.Capacity, error) {
	return s.all[0].Backend.Capacity(ctx)
}

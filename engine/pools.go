package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"holdfast/blockdev"
)

// OtherPool is a pool besides the first.
type OtherPool struct {
	Name   string
	Kind   string // of its backend
	Ledger *Ledger
	Remote bool  // it can have volumes of remote template versions
	Err    error // why it is not open
}

// Placer is a backend of several pools. pools.Set is one.
type Placer interface {
	blockdev.Backend
	// Place says in which pool an image is to be made or was made; "" is the first.
	Place(id blockdev.ID, pool string) error
	// In is a pool's own backend.
	In(pool string) (blockdev.Backend, error)
}

// The words of PoolPolicy, besides the name of a pool.
const (
	PolicyFirst    = "default"
	PolicyMostRoom = "most-free"
)

// choosePool gives the pool for a new volume, "" for the first: the one that was
// asked for, or the one that the policy names.
func (e *Engine) choosePool(asked string) (string, error) {
	if asked == "" {
		return e.policyPool(nil), nil
	}
	if asked == e.o.PoolName {
		return "", nil
	}
	i := slices.IndexFunc(e.o.Others, func(p OtherPool) bool { return p.Name == asked })
	if i < 0 {
		return "", problem(ErrInvalid, "spec.pool", "no pool is called %.60q: there are %s", asked, strings.Join(e.poolNames(), ", "))
	}
	return asked, e.poolOpen(asked)
}

// poolOpen refuses a pool that this host has and could not open: it has room for nothing.
func (e *Engine) poolOpen(pool string) error {
	for _, p := range e.o.Others {
		if p.Name == pool && p.Err != nil {
			return unavailable(pool, p.Err)
		}
	}
	return nil
}

func unavailable(pool string, err error) error {
	return &Problem{Kind: blockdev.ErrUnavailable, Field: "spec.pool", Message: fmt.Sprintf("pool %q is not available: its operator finds the reason in the server's log", pool), Err: err}
}

func (e *Engine) poolNames() []string {
	names := []string{e.o.PoolName}
	for _, p := range e.o.Others {
		names = append(names, p.Name)
	}
	return names
}

// policyPool is where a volume goes whose request names no pool; can, if not nil, says
// which of the pools besides the first can have it.
func (e *Engine) policyPool(can func(OtherPool) bool) string {
	switch e.o.PoolPolicy {
	case "", PolicyFirst, e.o.PoolName:
		return ""
	case PolicyMostRoom:
		best, most := "", e.o.Ledger.room()
		for _, p := range e.o.Others {
			if p.Err != nil || can != nil && !can(p) {
				continue
			}
			if room := p.Ledger.room(); room > most {
				best, most = p.Name, room
			}
		}
		return best
	}
	if i := slices.IndexFunc(e.o.Others, func(p OtherPool) bool { return p.Name == e.o.PoolPolicy }); can != nil && i >= 0 && !can(e.o.Others[i]) {
		return ""
	}
	return e.o.PoolPolicy
}

// holdsRemote reports whether a pool can have volumes of remote template versions. The
// first can where there is such a version.
func (e *Engine) holdsRemote(pool string) bool {
	return pool == "" || slices.ContainsFunc(e.o.Others, func(p OtherPool) bool { return p.Name == pool && p.Remote })
}

// remotePools tells a user which can.
func (e *Engine) remotePools() string {
	names := []string{e.o.PoolName}
	for _, p := range e.o.Others {
		if p.Remote && p.Err == nil {
			names = append(names, p.Name)
		}
	}
	return "Leave it out, or name one that can: " + strings.Join(names, ", ")
}

// ledger is the account of a pool. Of one that this host has no more the first one
// counts: its volumes are there, and cannot be used.
func (e *Engine) ledger(pool string) *Ledger {
	for _, p := range e.o.Others {
		if p.Name == pool {
			return p.Ledger
		}
	}
	return e.o.Ledger
}

func (e *Engine) eachLedger(fn func(*Ledger)) {
	fn(e.o.Ledger)
	for _, p := range e.o.Others {
		fn(p.Ledger)
	}
}

// place tells the backend where a volume's image is, or is to be.
func (e *Engine) place(id blockdev.ID, pool string) error {
	placer, ok := e.o.Pool.(Placer)
	switch {
	case ok:
		return placer.Place(id, pool)
	case pool != "":
		return fmt.Errorf("%w: this host has one pool", blockdev.ErrUnavailable)
	}
	return nil
}

// placeFound is place for a record of an earlier life.
func (e *Engine) placeFound(v Volume) {
	if err := e.place(v.ID, v.Pool); err != nil {
		e.o.Log.Error("a volume's pool is not there: the volume cannot be used until it is", "volume", v.ID, "pool", v.Pool, "err", err)
	}
}

// Pools tells the pools' space and promises. One that does not answer says why.
func (e *Engine) Pools(ctx context.Context) ([]PoolStatus, error) {
	first := PoolStatus{Name: e.o.PoolName, Backend: e.o.PoolKind}
	e.o.Ledger.status(&first)
	backend, err := e.backendOf("")
	if err == nil {
		err = ask(ctx, backend, &first)
	}
	if err != nil {
		return nil, err
	}
	all := []PoolStatus{first}
	for _, p := range e.o.Others {
		s := PoolStatus{Name: p.Name, Backend: p.Kind}
		p.Ledger.status(&s)
		err := p.Err
		if err == nil {
			var backend blockdev.Backend
			if backend, err = e.backendOf(p.Name); err == nil {
				err = ask(ctx, backend, &s)
			}
		}
		if err != nil {
			s.Unavailable = innermost(err)
		}
		all = append(all, s)
	}
	return all, nil
}

func (e *Engine) backendOf(pool string) (blockdev.Backend, error) {
	if placer, ok := e.o.Pool.(Placer); ok {
		return placer.In(pool)
	}
	return e.o.Pool, nil
}

// ask fills in what a pool says of itself.
func ask(ctx context.Context, pool blockdev.Backend, s *PoolStatus) (err error) {
	if s.Capacity, err = pool.Capacity(ctx); err != nil {
		return err
	}
	if s.Quarantined, err = pool.Quarantined(ctx); err != nil {
		return err
	}
	sharer, ok := pool.(interface {
		SharedBytes(context.Context) (int64, error)
	})
	if !ok {
		return nil
	}
	if s.Shared, err = sharer.SharedBytes(ctx); errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return err
}

// locate tells which image is each volume's. Of two with one id, which a move that
// was cut leaves, the one with the higher sequence is it, and a draft is not; the
// other is removed. What a move that goes on has copied stays, and is no volume; nor
// is what is left of one without the volume itself, in a pool that is not there.
func (e *Engine) locate(ctx context.Context, images []blockdev.Info) (map[blockdev.ID]blockdev.Info, error) {
	found := make(map[blockdev.ID]blockdev.Info, len(images))
	for _, info := range images {
		if !strings.HasPrefix(string(info.ID), blockdev.PrefixVolume+"-") || e.arriving(info) {
			continue
		}
		other, twice := found[info.ID]
		if twice {
			if supersedes(other, info) {
				info, other = other, info
			}
			if err := e.removeSuperseded(ctx, other, info); err != nil {
				return nil, err
			}
		}
		found[info.ID] = info
		if err := e.place(info.ID, info.Pool); err != nil {
			return nil, err
		}
	}
	for id, info := range found {
		if said, err := parseDescription(info.Description); err == nil && said.Incoming {
			e.o.Log.Error("what a move has copied is there and the volume is not: it is left alone", "volume", id, "pool", info.Pool)
			delete(found, id)
			if v, known := e.catalog.get(id); known {
				e.placeFound(v)
			}
		}
	}
	return found, nil
}

// arriving reports whether an image is what a move that goes on has copied so far.
func (e *Engine) arriving(info blockdev.Info) bool {
	v, known := e.catalog.get(info.ID)
	if !known {
		v, known = e.buried.get(info.ID)
	}
	if !known || !v.moving() || v.Move.To != info.Pool || info.Draft {
		return false
	}
	said, err := parseDescription(info.Description)
	return err == nil && said.Incoming
}

// supersedes reports whether a is the volume, of two images with its id.
func supersedes(a, b blockdev.Info) bool {
	if a.Draft != b.Draft {
		return b.Draft
	}
	x, errX := parseDescription(a.Description)
	y, errY := parseDescription(b.Description)
	if errX != nil || errY != nil {
		return errY != nil
	}
	return x.Sequence >= y.Sequence
}

func (e *Engine) removeSuperseded(ctx context.Context, old, now blockdev.Info) error {
	backend, err := e.backendOf(old.Pool)
	if err != nil {
		return err
	}
	e.o.Log.Info("a volume is in two pools, by a move: the older image is removed", "volume", old.ID, "from", old.Pool, "to", now.Pool)
	if old.Open {
		if err := closeLeft(ctx, backend, old.ID); err != nil {
			return err
		}
	}
	return backend.Remove(ctx, old.ID)
}

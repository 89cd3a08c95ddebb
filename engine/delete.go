package engine

import (
	"context"
	"errors"
	"sync"

	"holdfast/blockdev"
)

// DeleteVolume durably deletes; the answer's phase is Deleting and the name is
// free. An attached volume is ErrAttached.
func (e *Engine) DeleteVolume(ctx context.Context, workspace, name, actor string) (Volume, error) {
	return do(ctx, e, func(ctx context.Context) (Volume, error) {
		v, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Volume{}, err
		}
		defer release()
		if v, err = e.current(ctx, v); err != nil {
			return Volume{}, err
		}
		if len(v.Attachments) > 0 {
			return Volume{}, problem(ErrAttached, "", "volume %q is attached to %s: detach it first", v.Name, v.AttachedTo())
		}
		v = v.clone()
		v.UpdatedAt, v.UpdatedBy = e.now(), actor
		if err := e.mark(ctx, &v); err != nil {
			return Volume{}, userError(err)
		}
		if err := e.bury(ctx, v); err != nil {
			return Volume{}, userError(err)
		}
		e.feed.add(Happening{Workspace: v.Workspace, Volume: v.Name, Event: Event{Type: "deletion", Status: v.Status(), Message: "Volume is deleted", Time: v.UpdatedAt}})
		return v, nil
	})
}

// mark durably says in the image's description that the volume is being deleted:
// from here on it is finished, whatever happens. An image that is missing, or not
// yet there, needs no mark, and a pool that is full has no room for one: the
// record has it.
func (e *Engine) mark(ctx context.Context, v *Volume) error {
	v.Phase = Deleting
	v.Sequence++
	if v.moving() { // higher than what the other image may say already
		v.Sequence++
	}
	err := e.describeIfRoom(ctx, *v)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	return err
}

// bury records the deletion and frees the name, then takes image and record
// away. When that cannot be finished now, the volume waits among the buried for
// Run or the next start: it is deleted all the same.
func (e *Engine) bury(ctx context.Context, v Volume) error {
	if err := e.commitFreeing(ctx, v); err != nil {
		return err
	}
	e.buried.add(v)
	e.catalog.remove(v.ID)
	err := e.remove(ctx, v)
	if err != nil && !lostWrite(err) {
		e.o.Log.Warn("a deletion is not finished: it is tried again", "volume", v.ID, "workspace", v.Workspace, "err", err)
		e.wake()
		return nil
	}
	return err
}

// graveyard holds volumes whose deletion is not finished: their names are free,
// their promises are not.
type graveyard struct {
	mu      sync.Mutex
	volumes map[blockdev.ID]Volume
}

func newGraveyard() *graveyard { return &graveyard{volumes: map[blockdev.ID]Volume{}} }

func (g *graveyard) add(v Volume) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.volumes[v.ID] = v
}

func (g *graveyard) remove(id blockdev.ID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.volumes, id)
}

func (g *graveyard) get(id blockdev.ID) (Volume, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	v, ok := g.volumes[id]
	return v, ok
}

func (g *graveyard) all() []Volume {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := make([]Volume, 0, len(g.volumes))
	for _, v := range g.volumes {
		list = append(list, v)
	}
	return list
}

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
)

// bytes is the wanted size.
func (v Volume) bytes() int64 { return v.SizeMiB * filesystem.MiB }

// clone makes a copy that can be changed: volumes in the catalog never are.
func (v Volume) clone() Volume {
	v.Labels = maps.Clone(v.Labels)
	v.Attachments = slices.Clone(v.Attachments)
	v.Events = slices.Clone(v.Events)
	if v.Move != nil {
		move := *v.Move
		v.Move = &move
	}
	return v
}

// happened appends an event and keeps the newest.
func (e *Engine) happened(v *Volume, kind, format string, args ...any) {
	v.Events = append(v.Events, Event{Type: kind, Status: v.Status(), Message: fmt.Sprintf(format, args...), Time: e.now()})
	if over := len(v.Events) - maxEvents; over > 0 {
		v.Events = slices.Delete(v.Events, 0, over)
	}
}

// describe is the self-description that stands beside the image: the record
// itself, as canonical JSON (fields in order, map keys sorted).
func describe(v Volume) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("describe volume %s: %w", v.ID, err)
	}
	return b, nil
}

func parseDescription(b []byte) (Volume, error) {
	var v Volume
	if err := json.Unmarshal(b, &v); err != nil {
		return Volume{}, fmt.Errorf("volume description: %w", err)
	}
	if !v.ID.Valid() || v.Workspace == "" || v.Name == "" || v.SizeMiB < 1 || !v.Filesystem.Valid() {
		return Volume{}, fmt.Errorf("volume description of %s: fields are missing", v.ID)
	}
	return v, nil
}

// save makes a change of a published volume durable: its description first,
// then the record, then the catalog. Whoever reads after a crash between the two
// finds the higher sequence in the description and takes it.
func (e *Engine) save(ctx context.Context, v *Volume) error {
	v.Sequence++
	b, err := describe(*v)
	if err != nil {
		return err
	}
	if err := e.o.Pool.Describe(ctx, v.ID, b); err != nil {
		return err
	}
	return e.commit(ctx, *v)
}

// commit makes the record alone durable: for what the kernel can be asked again
// (how far an attachment got), and before there is an image to describe.
func (e *Engine) commit(ctx context.Context, v Volume) error {
	err := e.o.Store.Update(ctx, func(tx *metadata.Tx) error {
		return volumesTable.Put(tx, string(v.ID), v)
	})
	if err != nil {
		return err
	}
	e.publish(v)
	return nil
}

// publish makes a durable change visible: in the catalog, and in the feed.
func (e *Engine) publish(v Volume) {
	before, _ := e.catalog.get(v.ID)
	e.catalog.replace(v)
	e.tell(before, v)
}

// saveFreeing is save for a change that frees something: it works on a full pool
// and a full metadata filesystem as well. A description that does not fit any
// more stays as it was; the record has the higher sequence and is believed.
func (e *Engine) saveFreeing(ctx context.Context, v *Volume) error {
	v.Sequence++
	if err := e.describeIfRoom(ctx, *v); err != nil {
		return err
	}
	return e.commitFreeing(ctx, *v)
}

func (e *Engine) describeIfRoom(ctx context.Context, v Volume) error {
	b, err := describe(v)
	if err != nil {
		return err
	}
	err = e.o.Pool.Describe(ctx, v.ID, b)
	if errors.Is(err, blockdev.ErrNoSpace) && !lostWrite(err) {
		e.o.Log.Warn("the pool has no room for a description: only the record has the change", "volume", v.ID, "workspace", v.Workspace, "err", err)
		return nil
	}
	return err
}

// commitFreeing is commit for a change that frees something: it works on a full
// metadata filesystem as well.
func (e *Engine) commitFreeing(ctx context.Context, v Volume) error {
	err := e.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error {
		return volumesTable.Put(tx, string(v.ID), v)
	})
	if err != nil {
		return err
	}
	e.publish(v)
	return nil
}

// erase ends a volume's record and promise.
func (e *Engine) erase(ctx context.Context, id blockdev.ID) error {
	err := e.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error {
		return volumesTable.Delete(tx, string(id))
	})
	if err != nil {
		return err
	}
	e.eachLedger(func(l *Ledger) { l.forget(id) })
	e.catalog.remove(id)
	e.buried.remove(id)
	e.unwatch(id)
	e.mu.Lock()
	delete(e.pending, id)
	delete(e.filled, id)
	delete(e.unflat, id)
	delete(e.told, id)
	delete(e.retries, id)
	delete(e.endpoints, id)
	delete(e.trims.written, id)
	delete(e.trims.passed, id)
	e.mu.Unlock()
	return nil
}

package templates

import (
	"context"
	"fmt"
	"time"

	"holdfast/blockdev"
)

// Pin says who keeps a revision from being removed, and since when.
type Pin struct {
	By string    `json:"by,omitempty"`
	At time.Time `json:"at"`
}

// maxPins bounds the pinned revisions of a template: retention never takes one,
// and all of a template is one record.
const maxPins = 100

// Pin keeps a READY revision, by name, number or "latest", from being removed by
// retention or by hand, until Unpin. Pinned already is success and changes
// nothing. ErrNotFound for one that is not there; ErrInvalid for one that is not
// READY, or when too many are pinned.
func (l *Library) Pin(ctx context.Context, workspace, name, version, actor string) (Revision, error) {
	return l.setPin(ctx, workspace, name, version, func(r *record, v *Revision) error {
		switch {
		case v.Pinned != nil:
			return nil
		case v.Status != Ready:
			return invalid("version: %s of %q is %s; only a version that is READY can be pinned", v.Name, name, v.Status)
		case len(r.Pins) >= maxPins:
			return invalid("version: %q has %d pinned versions, which is the most", name, maxPins)
		}
		r.setPin(v.ID, Pin{By: actor, At: l.now()})
		return nil
	})
}

// Unpin takes the pin of a revision away. Not pinned is success. ErrNotFound.
func (l *Library) Unpin(ctx context.Context, workspace, name, version, actor string) (Revision, error) {
	return l.setPin(ctx, workspace, name, version, func(r *record, v *Revision) error {
		delete(r.Pins, v.ID)
		r.Template.UpdatedBy = actor
		return nil
	})
}

func (l *Library) setPin(ctx context.Context, workspace, name, version string, set func(*record, *Revision) error) (Revision, error) {
	var id blockdev.ID
	r, err := l.change(ctx, keyOf(workspace, name), func(r *record) (*record, error) {
		if r == nil {
			return nil, notFound(name)
		}
		v, err := r.need(version)
		if err != nil {
			return nil, err
		}
		id = v.ID
		return r, set(r, v)
	})
	if err != nil {
		return Revision{}, err
	}
	return *r.revision(id), nil
}

// need finds a revision by version, or says that it is not there.
func (r *record) need(version string) (*Revision, error) {
	v := r.find(version)
	if v == nil {
		return nil, fmt.Errorf("%w: version %.70q of %q", ErrNotFound, version, r.Template.Name)
	}
	return v, nil
}

func (r *record) setPin(id blockdev.ID, p Pin) {
	if r.Pins == nil {
		r.Pins = map[blockdev.ID]Pin{}
	}
	r.Pins[id] = p
}

// showPins makes the revisions say what Pins says: that map is the truth, because
// it is in the side log, where READY revisions are not.
func (r *record) showPins() {
	for i := range r.Template.Revisions {
		v := &r.Template.Revisions[i]
		v.Pinned = nil
		if p, pinned := r.Pins[v.ID]; pinned {
			v.Pinned = &p
		}
	}
}

// forgetPins drops pins of revisions that are not there.
func (r *record) forgetPins() {
	for id := range r.Pins {
		if r.revision(id) == nil {
			delete(r.Pins, id)
		}
	}
}

func (v Revision) pinnedError() error {
	return fmt.Errorf("%w: version %s of %q, by %s: unpin it first", ErrPinned, v.Name, v.Template, v.Pinned.By)
}

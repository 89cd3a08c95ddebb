package templates

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// record is a template with all that is kept of it: one record in the store.
// The side log holds it too, but without the READY revisions: their images'
// descriptions tell of those. A record in memory is never changed, only replaced.
type record struct {
	Sequence uint64                  `json:"sequence"` // of changes; the higher one is the truth
	Removed  bool                    `json:"removed,omitempty"`
	Template Template                `json:"template"`
	Pending  map[blockdev.ID]pending `json:"pending,omitempty"`  // of CREATED and FAILED revisions
	Removing []blockdev.ID           `json:"removing,omitempty"` // images that are to go
	Pins     map[blockdev.ID]Pin     `json:"pins,omitempty"`     // revisions that are kept
}

// pending is what is known of a revision that has no image.
type pending struct {
	Expires time.Time `json:"expires"`        // of its upload URL
	Lost    bool      `json:"lost,omitempty"` // it was READY once; kept until a user deletes it
}

const recordKind = "template" // in the side log

var records = metadata.Table[record]{Name: "template"}

func keyOf(workspace, name string) string { return workspace + "/" + name }

func (r *record) key() string { return keyOf(r.Template.Workspace, r.Template.Name) }

// copy gives a record that can be changed.
func (r *record) copy() *record {
	c := *r
	c.Template = r.Template.clone()
	c.Pending = maps.Clone(r.Pending)
	c.Removing = slices.Clone(r.Removing)
	c.Pins = maps.Clone(r.Pins)
	return &c
}

func (t Template) clone() Template {
	t.Labels = maps.Clone(t.Labels)
	t.Revisions = slices.Clone(t.Revisions)
	t.Events = slices.Clone(t.Events)
	return t
}

// forLog is the record as the side log holds it.
func (r *record) forLog() *record {
	c := r.copy()
	c.Template.Revisions = slices.DeleteFunc(c.Template.Revisions, func(v Revision) bool { return v.Status == Ready })
	return c
}

// revision finds one by id.
func (r *record) revision(id blockdev.ID) *Revision {
	for i := range r.Template.Revisions {
		if r.Template.Revisions[i].ID == id {
			return &r.Template.Revisions[i]
		}
	}
	return nil
}

// find finds a revision by version: its name, its number or "latest".
func (r *record) find(version string) *Revision {
	if version == "" || version == LatestVersion {
		return r.Template.Latest()
	}
	for i := range r.Template.Revisions {
		if v := &r.Template.Revisions[i]; v.Name == version || fmt.Sprint(v.Number) == version {
			return v
		}
	}
	return nil
}

// drop takes a revision out of the record.
func (r *record) drop(id blockdev.ID) {
	r.Template.Revisions = slices.DeleteFunc(r.Template.Revisions, func(v Revision) bool { return v.ID == id })
	delete(r.Pending, id)
	delete(r.Pins, id)
}

// hasImage tells whether a revision of the record has an image in the pool.
func (r *record) hasImage(id blockdev.ID) bool {
	_, isPending := r.Pending[id]
	return !isPending && r.revision(id) != nil
}

// remove takes a revision that has an image out; the image is to go.
func (r *record) remove(id blockdev.ID) {
	r.drop(id)
	r.Removing = append(r.Removing, id)
}

func (r *record) setPending(id blockdev.ID, p pending) {
	if r.Pending == nil {
		r.Pending = map[blockdev.ID]pending{}
	}
	r.Pending[id] = p
}

// insert puts a revision in its place by number.
func (r *record) insert(v Revision) {
	i, _ := slices.BinarySearchFunc(r.Template.Revisions, v.Number, func(a Revision, n int) int { return a.Number - n })
	r.Template.Revisions = slices.Insert(r.Template.Revisions, i, v)
	r.Template.NextNumber = max(r.Template.NextNumber, v.Number+1)
}

// change durably changes one template's record: first the side log, then the
// store, then memory. fn gets a copy, and says no with an error; it gets nil for
// a template that is not there. Changes of one template are one after the other.
func (l *Library) change(ctx context.Context, key string, fn func(*record) (*record, error)) (*record, error) {
	lock := l.locks.lock(key)
	defer lock.Unlock()
	return l.changeLocked(ctx, key, fn)
}

func (l *Library) changeLocked(ctx context.Context, key string, fn func(*record) (*record, error)) (*record, error) {
	old, tomb := l.lookup(key), l.tomb(key)
	if tomb != nil {
		if err := l.bury(ctx, tomb); err != nil {
			return nil, fmt.Errorf("finish an earlier deletion: %w", err)
		}
	}
	var draft *record
	if old != nil {
		draft = old.copy()
	}
	next, err := fn(draft)
	if err != nil {
		return nil, err
	}
	l.forgetRemoved(next)
	next.showPins()
	next.Sequence++
	if err := l.write(ctx, next, old); err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.replace(key, next)
	l.mu.Unlock()
	return next, nil
}

// write makes a record durable. When the store refuses it the side log is put
// right again as far as it goes: an error is no promise that nothing changed.
func (l *Library) write(ctx context.Context, next, old *record) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx) // both or none
	if err := l.o.SideLog.Append(recordKind, next.key(), next.forLog()); err != nil {
		return err
	}
	update := l.o.Store.Update
	if next.Removed || old != nil && len(next.Removing) > len(old.Removing) {
		update = l.o.Store.UpdateFreeing
	}
	err := update(ctx, func(tx *metadata.Tx) error { return records.Put(tx, next.key(), *next) })
	if err == nil {
		return nil
	}
	if old == nil {
		_ = l.o.SideLog.Append(recordKind, next.key(), nil)
	} else {
		undo := old.copy()
		undo.Sequence = next.Sequence + 1
		_ = l.o.SideLog.Append(recordKind, next.key(), undo.forLog())
	}
	return err
}

// keyLocks are mutexes by key; those that nobody holds take no memory.
type keyLocks struct {
	mu   sync.Mutex
	held map[string]*keyLock
}

type keyLock struct {
	sync.Mutex
	users int
	of    *keyLocks
	key   string
}

func (k *keyLocks) lock(key string) *keyLock {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*keyLock{}
	}
	l := k.held[key]
	if l == nil {
		l = &keyLock{of: k, key: key}
		k.held[key] = l
	}
	l.users++
	k.mu.Unlock()
	l.Mutex.Lock()
	return l
}

// Unlock lets the next one in.
func (l *keyLock) Unlock() {
	l.of.mu.Lock()
	defer l.of.mu.Unlock()
	l.Mutex.Unlock()
	if l.users--; l.users == 0 {
		delete(l.of.held, l.key)
	}
}

// description is what stands beside an image in the pool. It explains the image
// without any other record. Format is 1; readers refuse what they do not know.
type description struct {
	Format   int         `json:"format"`
	Kind     string      `json:"kind"` // "revision" or "source"
	Deleted  bool        `json:"deleted,omitempty"`
	Template *record     `json:"template,omitempty"` // the head as it was then; without revisions
	Revision *Revision   `json:"revision,omitempty"`
	Source   *SourceSpec `json:"source,omitempty"`
	Recipe   int         `json:"recipe,omitempty"` // of a source: how it was made
	Bytes    int64       `json:"bytes,omitempty"`  // of a source: what it occupies by itself
}

const (
	descriptionFormat = 1
	kindRevision      = "revision"
	kindSource        = "source"
	// sourceRecipe changes when sources are to be made otherwise: those of another
	// recipe are removed at Open.
	sourceRecipe = 1
)

func (d description) encode() []byte {
	d.Format = descriptionFormat
	b, err := json.Marshal(d)
	if err != nil {
		panic(err) // no field of it can fail
	}
	return b
}

func decodeDescription(b []byte) (description, error) {
	var d description
	if err := json.Unmarshal(b, &d); err != nil {
		return d, fmt.Errorf("description: %w", err)
	}
	switch {
	case d.Format != descriptionFormat:
		return d, fmt.Errorf("description of format %d, want %d", d.Format, descriptionFormat)
	case d.Kind == kindRevision && (d.Revision == nil || d.Template == nil):
		return d, fmt.Errorf("description without its revision")
	case d.Kind == kindSource && d.Source == nil:
		return d, fmt.Errorf("description without its source")
	case d.Kind != kindRevision && d.Kind != kindSource:
		return d, fmt.Errorf("description of a %q", d.Kind)
	}
	return d, nil
}

// describe is the description of a READY revision.
func describe(head *record, v Revision) description {
	h := head.forLog()
	h.Template.Revisions, h.Template.Events, h.Pending, h.Removing, h.Pins = nil, nil, nil, nil, nil
	return description{Kind: kindRevision, Template: h, Revision: &v}
}

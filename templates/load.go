package templates

import (
	"cmp"
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// Rebuild makes the records in the store anew from the pool and the side log
// alone: what the store says is thrown away. Nothing else may use the Library
// meanwhile.
func (l *Library) Rebuild(ctx context.Context) error {
	if err := l.load(ctx, true); err != nil {
		return fmt.Errorf("rebuild templates: %w", err)
	}
	return nil
}

// load finds out what exists and makes records, memory and pool agree. The
// images' descriptions say which revisions are READY; of everything else the
// record with the higher sequence is the truth, from the side log or the store.
func (l *Library) load(ctx context.Context, ignoreStore bool) error {
	l.mu.Lock()
	l.records, l.revisions = map[string]*record{}, map[blockdev.ID]string{}
	l.active, l.pins, l.doomed = map[blockdev.ID]bool{}, map[blockdev.ID]int{}, map[blockdev.ID]bool{}
	l.tombs, l.suspect, l.leaving = map[string]*record{}, map[blockdev.ID]bool{}, map[blockdev.ID]string{}
	l.mu.Unlock()
	l.images = imageBytes{}
	l.sources = &sourceCache{
		max: l.o.MaxSources, make: l.makeSource, remove: l.removeSource, log: l.o.Log, ctx: l.stopping,
		bySpec: map[SourceSpec]*source{}, order: list.New(),
	}
	if err := emptyDirectory(l.o.Staging); err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	var err error
	if l.reflinks, err = canShare(l.o.Staging); err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	images, err := l.findImages(ctx)
	if err != nil {
		return err
	}
	stored, err := l.readRecords(ignoreStore)
	if err != nil {
		return err
	}
	if err := l.reconcile(ctx, stored, images); err != nil {
		return err
	}
	l.settleAddresses(ctx)
	return l.sweepManifests()
}

// found is what the pool holds that is ours and explains itself.
type found struct {
	revisions map[blockdev.ID]foundImage
	sources   []foundImage
}

type foundImage struct {
	id        blockdev.ID
	allocated int64
	d         description
}

// findImages reads the pool and removes what a crash left unfinished there.
func (l *Library) findImages(ctx context.Context) (found, error) {
	f := found{revisions: map[blockdev.ID]foundImage{}}
	infos, err := l.o.Pool.List(ctx)
	if err != nil {
		return f, err
	}
	for _, info := range infos {
		if kind, _, _ := strings.Cut(string(info.ID), "-"); kind != blockdev.PrefixRevision && kind != blockdev.PrefixSource {
			continue
		}
		if info.Open {
			if err := l.closeLeft(ctx, info.ID); err != nil {
				return f, err
			}
		}
		if info.Draft {
			l.o.Log.Info("an unfinished image is removed", "image", info.ID)
			if err := l.o.Pool.Remove(ctx, info.ID); err != nil {
				return f, err
			}
			continue
		}
		d, err := decodeDescription(info.Description)
		if err != nil {
			// Written by a later version, perhaps: not ours to remove.
			l.o.Log.Error("an image that we cannot explain is left alone", "image", info.ID, "error", err)
			continue
		}
		image := foundImage{id: info.ID, allocated: info.Allocated, d: d}
		if d.Kind == kindSource {
			f.sources = append(f.sources, image)
		} else {
			f.revisions[info.ID] = image
		}
	}
	return f, nil
}

// closeLeft takes the opening away that a process before this one left.
func (l *Library) closeLeft(ctx context.Context, id blockdev.ID) error {
	wants := []blockdev.Want{
		{Kinds: []blockdev.Kind{blockdev.Block}}, {Kinds: []blockdev.Kind{blockdev.Block}, ReadOnly: true},
		{Kinds: []blockdev.Kind{blockdev.File}}, {Kinds: []blockdev.Kind{blockdev.File}, ReadOnly: true},
	}
	var err error
	for _, w := range wants {
		var e blockdev.Endpoint
		if e, err = l.o.Pool.Open(ctx, id, w); err == nil {
			return l.o.Pool.Close(ctx, id, e.Lease)
		}
		if !errors.Is(err, blockdev.ErrBusy) {
			return err
		}
	}
	return err
}

// written is what is written about templates, in both places.
type written struct {
	newest        map[string]*record
	inStore, logs map[string]string // canonical JSON
}

func (w *written) take(key string, r *record) {
	if old := w.newest[key]; old == nil || r.Sequence > old.Sequence {
		w.newest[key] = r
	}
}

// holds tells whether both places have a record as it is.
func (w *written) holds(key string, r *record) bool {
	return w.inStore[key] == toJSON(r) && w.logs[key] == toJSON(r.forLog())
}

// readRecords reads both places. At the same sequence the store's record counts,
// which is the same and has the READY revisions too.
func (l *Library) readRecords(ignoreStore bool) (*written, error) {
	w := &written{newest: map[string]*record{}, inStore: map[string]string{}, logs: map[string]string{}}
	err := l.o.Store.View(func(tx *metadata.Tx) error {
		return records.Scan(tx, "", func(key string, r record) error {
			w.inStore[key] = toJSON(&r)
			if !ignoreStore {
				w.take(key, &r)
			}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	err = l.o.SideLog.Each(recordKind, func(key string, value []byte) error {
		var r record
		if err := json.Unmarshal(value, &r); err != nil {
			return fmt.Errorf("side log: template %q: %w", key, err)
		}
		w.logs[key] = toJSON(&r)
		w.take(key, &r)
		return nil
	})
	return w, err
}

func toJSON(r *record) string {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // no field of it can fail
	}
	return string(b)
}

// reconcile makes of what was found the records that are true, and writes those
// that differ from what is written.
func (l *Library) reconcile(ctx context.Context, w *written, images found) error {
	next := map[string]*record{}
	for key, r := range w.newest {
		next[key] = r.copy()
	}
	for _, image := range sortedImages(images.revisions) {
		if err := l.place(ctx, next, image); err != nil {
			return err
		}
	}
	for key, r := range next {
		if err := l.settle(ctx, key, r, w, images.revisions); err != nil {
			return err
		}
	}
	l.countRevisions(ctx, images.revisions)
	return l.adoptSources(ctx, images.sources)
}

func sortedImages(images map[blockdev.ID]foundImage) []foundImage {
	list := make([]foundImage, 0, len(images))
	for _, image := range images {
		list = append(list, image)
	}
	slices.SortFunc(list, func(a, b foundImage) int { return cmp.Compare(a.id, b.id) })
	return list
}

// place puts a revision that the pool holds into its template's record, or
// takes the image away when it is known to be deleted.
func (l *Library) place(ctx context.Context, next map[string]*record, image foundImage) error {
	v := *image.d.Revision
	key := keyOf(v.Workspace, v.Template)
	r := next[key]
	if image.d.Deleted || r != nil && (r.Removed || slices.Contains(r.Removing, image.id)) {
		l.o.Log.Info("the image of a deleted version is removed", "image", image.id, "template", key)
		return l.o.Pool.Remove(ctx, image.id)
	}
	if r == nil {
		l.o.Log.Warn("a template is adopted from an image", "template", key, "image", image.id)
		r = image.d.Template.copy()
		next[key] = r
	}
	if r.revision(image.id) == nil {
		r.insert(v)
	} else {
		if at := r.revision(image.id).VerifiedAt; at.After(v.VerifiedAt) {
			v.VerifiedAt = at
		}
		*r.revision(image.id) = v
	}
	delete(r.Pending, image.id)
	if l.o.Unclean && v.Status == Ready {
		l.suspect[image.id] = true
	}
	return nil
}

// settle corrects what a record says of revisions without image, finishes
// deletions, and writes the record where it is not written like this.
func (l *Library) settle(ctx context.Context, key string, r *record, w *written, images map[blockdev.ID]foundImage) error {
	if r.Removed {
		return l.bury(ctx, r)
	}
	r.Removing = nil
	for i := range r.Template.Revisions {
		v := &r.Template.Revisions[i]
		if _, has := images[v.ID]; has || !r.hasImage(v.ID) {
			continue
		}
		l.o.Log.Error("the image of a version is missing from the pool", "template", key, "version", v.Name, "image", v.ID)
		v.Status, v.Failure, v.Damaged = Failed, "its image is missing from the pool", true
		r.setPending(v.ID, pending{Lost: true})
	}
	r.forgetPins()
	r.showPins()
	l.replace(key, r)
	if w.holds(key, r) {
		return nil
	}
	r.Sequence++
	return l.write(ctx, r, w.newest[key])
}

// adoptSources takes cached images in again; those that nobody can ask for any
// more are removed. After an unclean stop all are: they are made again, from
// images that are verified first.
func (l *Library) adoptSources(ctx context.Context, images []foundImage) error {
	slices.SortFunc(images, func(a, b foundImage) int { return cmp.Compare(a.id, b.id) })
	for _, image := range images {
		spec := *image.d.Source
		known := spec.Revision == "" || l.readyRevision(spec.Revision)
		if !l.o.Unclean && image.d.Recipe == sourceRecipe && known && l.sources.add(spec, image.id) {
			l.account(image.id, image.d)
			continue
		}
		if err := l.o.Pool.Remove(ctx, image.id); err != nil {
			return err
		}
	}
	return nil
}

func (l *Library) readyRevision(id blockdev.ID) bool {
	r := l.records[l.revisions[id]]
	return r != nil && r.revision(id).Status == Ready
}

func (l *Library) removeSource(ctx context.Context, id blockdev.ID) error {
	if err := l.o.Pool.Remove(ctx, id); err != nil {
		return err
	}
	l.images.remove(id)
	l.elsewhere.forget(id)
	return nil
}

// emptyDirectory removes what is in a directory of ours, which is made if need be.
func emptyDirectory(dir string) error {
	if dir == "" || !filepath.IsAbs(dir) {
		return fmt.Errorf("%q is not an absolute path", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := os.RemoveAll(filepath.Join(dir, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}

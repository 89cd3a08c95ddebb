package templates

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// imageBytes is the account of what our images occupy. Revisions of one family
// share blocks; a block counts once, with the oldest that has it. As images of
// a family come and go, what each of them counts for changes.
type imageBytes struct {
	mu       sync.Mutex
	bytes    map[blockdev.ID]int64
	sum      [2]int64                            // of revisions, of sources
	families map[blockdev.ID]map[blockdev.ID]lay // by the family's first, by image
	familyOf map[blockdev.ID]blockdev.ID
}

// lay is where an image lies in the pool: what it occupies, and the ranges of the
// pool's device where they are known, in order of their place.
type lay struct {
	allocated int64
	ranges    []placed
}

type placed struct{ at, end int64 }

func kindIndex(id blockdev.ID) int {
	if strings.HasPrefix(string(id), blockdev.PrefixSource) {
		return 1
	}
	return 0
}

// set counts an image that shares nothing.
func (b *imageBytes) set(id blockdev.ID, bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.put(id, bytes)
}

func (b *imageBytes) put(id blockdev.ID, bytes int64) {
	if b.bytes == nil {
		b.bytes = map[blockdev.ID]int64{}
	}
	b.sum[kindIndex(id)] += bytes - b.bytes[id]
	b.bytes[id] = bytes
}

// join counts an image as one of a family.
func (b *imageBytes) join(id, family blockdev.ID, l lay) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.families == nil {
		b.families, b.familyOf = map[blockdev.ID]map[blockdev.ID]lay{}, map[blockdev.ID]blockdev.ID{}
	}
	if b.families[family] == nil {
		b.families[family] = map[blockdev.ID]lay{}
	}
	b.families[family][id] = l
	b.familyOf[id] = family
	b.share(family)
}

// share counts a family's images again; mu is held.
func (b *imageBytes) share(family blockdev.ID) {
	members := b.families[family]
	ids := make([]blockdev.ID, 0, len(members))
	for id := range members {
		ids = append(ids, id)
	}
	slices.Sort(ids) // by time
	var taken []placed
	for _, id := range ids {
		l := members[id]
		if len(l.ranges) == 0 {
			b.put(id, l.allocated)
			continue
		}
		own := int64(0)
		if len(ids) > 1 {
			taken, own = union(taken, l.ranges)
		} else {
			own = l.allocated
		}
		b.put(id, own)
	}
}

// union adds ranges to those that are taken, both in order, and tells how much
// was not.
func union(taken, more []placed) (all []placed, added int64) {
	before := int64(0)
	for _, p := range taken {
		before += p.end - p.at
	}
	merged := slices.Concat(taken, more)
	slices.SortFunc(merged, func(a, b placed) int { return cmp.Compare(a.at, b.at) })
	for _, p := range merged {
		if n := len(all); n > 0 && all[n-1].end >= p.at {
			all[n-1].end = max(all[n-1].end, p.end)
			continue
		}
		all = append(all, p)
	}
	after := int64(0)
	for _, p := range all {
		after += p.end - p.at
	}
	return all, after - before
}

func (b *imageBytes) remove(id blockdev.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sum[kindIndex(id)] -= b.bytes[id]
	delete(b.bytes, id)
	family, ok := b.familyOf[id]
	if !ok {
		return
	}
	delete(b.familyOf, id)
	delete(b.families[family], id)
	if len(b.families[family]) == 0 {
		delete(b.families, family)
		return
	}
	b.share(family)
}

// allocated is what an image occupies, with what it shares.
func (b *imageBytes) allocated(id blockdev.ID) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if l, ok := b.families[b.familyOf[id]][id]; ok {
		return l.allocated
	}
	return b.bytes[id]
}

// unplaced names the images of a family of which it is not known where they lie.
func (b *imageBytes) unplaced(family blockdev.ID) (ids []blockdev.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, l := range b.families[family] {
		if len(l.ranges) == 0 {
			ids = append(ids, id)
		}
	}
	return ids
}

func (b *imageBytes) total() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sum[0] + b.sum[1]
}

func (b *imageBytes) byKind() (revisions, sources int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sum[0], b.sum[1]
}

// family is the first of the revisions that a revision may share blocks with.
func (v Revision) family() blockdev.ID { return cmp.Or(v.Family, v.ID) }

// count takes a published revision into the account. One that was made from
// another shares blocks with its family, whose members are then looked at too.
func (l *Library) count(ctx context.Context, v Revision, allocated int64) {
	l.images.join(v.ID, v.family(), lay{allocated: allocated})
	if v.family() == v.ID {
		return
	}
	for _, id := range l.images.unplaced(v.family()) {
		ranges, err := l.ranges(ctx, id)
		if err != nil { // what it shares counts twice, which is safe
			l.o.Log.Warn("it is not known what an image shares", "image", id, "cause", err)
			continue
		}
		l.images.join(id, v.family(), lay{allocated: l.images.allocated(id), ranges: ranges})
	}
}

// ranges tells where an image lies; nothing where that cannot be told.
func (l *Library) ranges(ctx context.Context, id blockdev.ID) (ranges []placed, err error) {
	image, release, err := l.lend(ctx, id)
	if err != nil {
		return nil, err
	}
	defer release()
	if info, err := image.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, err
	}
	err = sys.EachMapped(image, func(m sys.MappedExtent) error {
		ranges = append(ranges, placed{m.Physical, m.Physical + m.Length})
		return ctx.Err()
	})
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	slices.SortFunc(ranges, func(a, b placed) int { return cmp.Compare(a.at, b.at) })
	return ranges, err
}

// countRevisions takes all images of revisions into the account.
func (l *Library) countRevisions(ctx context.Context, images map[blockdev.ID]foundImage) {
	for _, r := range l.records {
		for _, v := range r.Template.Revisions {
			if image, has := images[v.ID]; has {
				l.count(ctx, v, image.allocated)
			}
		}
	}
}

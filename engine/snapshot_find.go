package engine

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// maxSnapshots bounds those of one volume.
const maxSnapshots = 128

// snapshotsTable has the records by id.
var snapshotsTable = metadata.Table[Snapshot]{Name: "snapshots"}

// snapshots is every snapshot, in memory: what listings and look-ups read. Those in
// it are never changed, only replaced.
type snapshots struct {
	mu      sync.RWMutex
	all     map[blockdev.ID]Snapshot
	names   map[snapshotName]blockdev.ID
	leaving map[blockdev.ID]Snapshot // whose deletion is not finished: their names are free, their promises are not
}

type snapshotName struct {
	volume blockdev.ID
	name   string
}

func newSnapshots() *snapshots {
	return &snapshots{all: map[blockdev.ID]Snapshot{}, names: map[snapshotName]blockdev.ID{}, leaving: map[blockdev.ID]Snapshot{}}
}

// add puts a new snapshot in; false if the name is taken.
func (c *snapshots) add(s Snapshot) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	name := snapshotName{s.VolumeID, s.Name}
	if _, taken := c.names[name]; taken {
		return false
	}
	c.names[name], c.all[s.ID] = s.ID, s
	return true
}

// replace changes one that is there.
func (c *snapshots) replace(s Snapshot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.all[s.ID]; ok {
		c.all[s.ID] = s
	}
}

// leave frees the name of one whose deletion is durable.
func (c *snapshots) leave(s Snapshot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(s.ID)
	c.leaving[s.ID] = s
}

func (c *snapshots) remove(id blockdev.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(id)
	delete(c.leaving, id)
}

func (c *snapshots) drop(id blockdev.ID) {
	if s, ok := c.all[id]; ok {
		delete(c.names, snapshotName{s.VolumeID, s.Name})
		delete(c.all, id)
	}
}

func (c *snapshots) get(id blockdev.ID) (Snapshot, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	s, ok := c.all[id]
	return s, ok
}

func (c *snapshots) left(id blockdev.ID) (Snapshot, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	s, ok := c.leaving[id]
	return s, ok
}

func (c *snapshots) named(volume blockdev.ID, name string) (Snapshot, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	s, ok := c.all[c.names[snapshotName{volume, name}]]
	return s, ok
}

func (c *snapshots) ofVolume(volume blockdev.ID) (n int) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for name := range c.names {
		if name.volume == volume {
			n++
		}
	}
	return n
}

// list gives those that match, by id: in the order in which they were made.
func (c *snapshots) list(matches func(Snapshot) bool) []Snapshot {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return sorted(c.all, matches)
}

func (c *snapshots) allLeaving() []Snapshot {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return sorted(c.leaving, func(Snapshot) bool { return true })
}

func sorted(all map[blockdev.ID]Snapshot, matches func(Snapshot) bool) []Snapshot {
	var found []Snapshot
	for _, s := range all {
		if matches(s) {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b Snapshot) int { return cmp.Compare(a.ID, b.ID) })
	return found
}

// newSnapshotName names a snapshot whose creator gave no name.
func newSnapshotName() string {
	var b [4]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return "snapshot-" + hex.EncodeToString(b[:])
}

// Snapshot finds a snapshot by its id.
func (e *Engine) Snapshot(workspace string, id blockdev.ID) (Snapshot, error) {
	if s, ok := e.snapshots.get(id); ok && s.Workspace == workspace {
		return s, nil
	}
	return Snapshot{}, problem(ErrNotFound, "", "snapshot %.60q not found", id)
}

// SnapshotOf finds a snapshot of a volume by its name or id.
func (e *Engine) SnapshotOf(workspace, volume, name string) (Snapshot, error) {
	v, err := e.Volume(workspace, volume)
	if err != nil {
		return Snapshot{}, err
	}
	if s, ok := e.snapshots.named(v.ID, name); ok {
		return s, nil
	}
	if s, ok := e.snapshots.get(blockdev.ID(name)); ok && s.VolumeID == v.ID {
		return s, nil
	}
	return Snapshot{}, problem(ErrNotFound, "", "volume %q has no snapshot %.60q", volume, name)
}

// ResolveSnapshot finds a snapshot by "volume/snapshot" or by its id, which is the
// only way once its volume is deleted.
func (e *Engine) ResolveSnapshot(workspace, ref string) (Snapshot, error) {
	if volume, name, ok := strings.Cut(ref, "/"); ok {
		return e.SnapshotOf(workspace, volume, name)
	}
	return e.Snapshot(workspace, blockdev.ID(ref))
}

// SnapshotQuery selects snapshots of one workspace.
type SnapshotQuery struct {
	Volume string            // name of a volume that is there; empty: all, also of deleted volumes
	Labels map[string]string // all must match
	Sort   Sort              // empty: NewestFirst
	After  *Position         // the last item of the page before; nil: from the start
	Limit  int               // at most this many; 0: no limit
}

// SnapshotPage is one page of a listing.
type SnapshotPage struct {
	Snapshots []Snapshot
	Next      *Position // nil: this was the last page
	Total     int       // of the volume, or of the workspace, whatever the labels
}

// Snapshots gives one page of a workspace's snapshots.
func (e *Engine) Snapshots(workspace string, q SnapshotQuery) (SnapshotPage, error) {
	var volume blockdev.ID
	if q.Volume != "" {
		v, err := e.Volume(workspace, q.Volume)
		if err != nil {
			return SnapshotPage{}, err
		}
		volume = v.ID
	}
	all := e.snapshots.list(func(s Snapshot) bool {
		return s.Workspace == workspace && (volume == "" || s.VolumeID == volume)
	})
	p := SnapshotPage{Total: len(all)}
	order := q.Sort.order()
	slices.SortFunc(all, func(a, b Snapshot) int { return order(a.position(), b.position()) })
	for _, s := range all {
		if q.After != nil && order(s.position(), *q.After) <= 0 || !hasLabels(s.Labels, q.Labels) {
			continue
		}
		if q.Limit > 0 && len(p.Snapshots) == q.Limit {
			last := p.Snapshots[q.Limit-1].position()
			p.Next = &last
			break
		}
		p.Snapshots = append(p.Snapshots, s)
	}
	return p, nil
}

func (s Snapshot) position() Position {
	return Position{CreatedAt: s.CreatedAt, Name: s.Name, ID: s.ID}
}

// order compares two places in a listing. Ids tell apart what is alike otherwise.
func (s Sort) order() func(a, b Position) int {
	byTime := func(a, b Position) int { return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID)) }
	byName := func(a, b Position) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) }
	switch s {
	case OldestFirst:
		return byTime
	case NameUp:
		return byName
	case NameDown:
		return func(a, b Position) int { return byName(b, a) }
	}
	return func(a, b Position) int { return byTime(b, a) }
}

func hasLabels(labels, wanted map[string]string) bool {
	for key, want := range wanted {
		if got, ok := labels[key]; !ok || got != want {
			return false
		}
	}
	return true
}

// SnapshotSpace asks the pool what a snapshot occupies: all of its bytes, and those
// that deleting it would free, as far as the pool can tell (errors.ErrUnsupported,
// with allocated all the same).
func (e *Engine) SnapshotSpace(ctx context.Context, s Snapshot) (allocated, exclusive int64, err error) {
	info, err := e.o.Pool.Stat(ctx, s.ID)
	if err != nil {
		return 0, 0, err
	}
	accountant, ok := e.o.Pool.(blockdev.Accountant)
	if !ok {
		return info.Allocated, 0, errors.ErrUnsupported
	}
	exclusive, err = accountant.Exclusive(ctx, s.ID)
	return info.Allocated, exclusive, err
}

// SnapshotCounts counts all snapshots, and the bytes that are promised to them.
func (e *Engine) SnapshotCounts() (n int, bytes int64) {
	for _, s := range e.snapshots.list(func(Snapshot) bool { return true }) {
		n++
		bytes += s.Bytes
	}
	return n, bytes
}

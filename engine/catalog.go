package engine

import (
	"cmp"
	"slices"
	"strings"
	"sync"

	"holdfast/blockdev"
)

// catalog is what listings and look-ups read: every volume, in memory, in the
// orders that the API offers. Records are durable in the store; the catalog is
// made from them at start. Volumes in it are never changed, only replaced.
type catalog struct {
	mu         sync.RWMutex
	byID       map[blockdev.ID]*entry
	workspaces map[string]*shelf
}

// shelf is one workspace's part.
type shelf struct {
	byName     map[string]*entry
	byExternal map[string][]*entry // newest last
	created    []*entry            // by time, then id
	names      []*entry            // by name
}

type entry struct {
	v    Volume
	text string // what a search looks in, lower-case
}

func newCatalog() *catalog {
	return &catalog{byID: map[blockdev.ID]*entry{}, workspaces: map[string]*shelf{}}
}

// add puts a new volume on its shelf; false if the name is taken.
func (c *catalog) add(v Volume) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.workspaces[v.Workspace]
	if s == nil {
		s = &shelf{byName: map[string]*entry{}, byExternal: map[string][]*entry{}}
		c.workspaces[v.Workspace] = s
	}
	if s.byName[v.Name] != nil {
		return false
	}
	s.insert(c.entry(v))
	return true
}

// replace changes a volume that is in the catalog; absent ones stay absent.
func (c *catalog) replace(v Volume) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.byID[v.ID]
	if old == nil {
		return
	}
	s := c.workspaces[v.Workspace]
	s.remove(old)
	s.insert(c.entry(v))
}

// remove takes a volume out; its name is free. Absent is success.
func (c *catalog) remove(id blockdev.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.byID[id]; old != nil {
		c.workspaces[old.v.Workspace].remove(old)
		delete(c.byID, id)
	}
}

func (c *catalog) entry(v Volume) *entry {
	e := &entry{v: v, text: searchText(v)}
	c.byID[v.ID] = e
	return e
}

func (c *catalog) get(id blockdev.ID) (Volume, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if e := c.byID[id]; e != nil {
		return e.v, true
	}
	return Volume{}, false
}

func (c *catalog) named(workspace, name string) (Volume, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if s := c.workspaces[workspace]; s != nil {
		if e := s.byName[name]; e != nil {
			return e.v, true
		}
	}
	return Volume{}, false
}

func (c *catalog) external(workspace, externalID string) (Volume, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if s := c.workspaces[workspace]; s != nil {
		if es := s.byExternal[externalID]; len(es) > 0 {
			return es[len(es)-1].v, true
		}
	}
	return Volume{}, false
}

// each calls fn with every volume, in no order, on a copy of the list.
func (c *catalog) each(fn func(Volume)) {
	c.mu.RLock()
	all := make([]*entry, 0, len(c.byID))
	for _, e := range c.byID {
		all = append(all, e)
	}
	c.mu.RUnlock()
	for _, e := range all {
		fn(e.v)
	}
}

func (s *shelf) insert(e *entry) {
	s.byName[e.v.Name] = e
	if x := e.v.ExternalID; x != "" {
		i, _ := slices.BinarySearchFunc(s.byExternal[x], e, byCreation)
		s.byExternal[x] = slices.Insert(s.byExternal[x], i, e)
	}
	i, _ := slices.BinarySearchFunc(s.created, e, byCreation)
	s.created = slices.Insert(s.created, i, e)
	i, _ = slices.BinarySearchFunc(s.names, e, byName)
	s.names = slices.Insert(s.names, i, e)
}

func (s *shelf) remove(e *entry) {
	delete(s.byName, e.v.Name)
	if x := e.v.ExternalID; x != "" {
		s.byExternal[x] = without(s.byExternal[x], e, byCreation)
		if len(s.byExternal[x]) == 0 {
			delete(s.byExternal, x)
		}
	}
	s.created = without(s.created, e, byCreation)
	s.names = without(s.names, e, byName)
}

func without(list []*entry, e *entry, order func(a, b *entry) int) []*entry {
	if i, found := slices.BinarySearchFunc(list, e, order); found {
		return slices.Delete(list, i, i+1)
	}
	return list
}

func byCreation(a, b *entry) int {
	if c := a.v.CreatedAt.Compare(b.v.CreatedAt); c != 0 {
		return c
	}
	return cmp.Compare(a.v.ID, b.v.ID)
}

func byName(a, b *entry) int { return cmp.Compare(a.v.Name, b.v.Name) }

func searchText(v Volume) string {
	var b strings.Builder
	b.WriteString(v.Name)
	b.WriteByte(0)
	b.WriteString(v.DisplayName)
	for key, value := range v.Labels {
		b.WriteByte(0)
		b.WriteString(key)
		b.WriteByte(0)
		b.WriteString(value)
	}
	return strings.ToLower(b.String())
}

// page answers a query.
func (c *catalog) page(workspace string, q Query) Page {
	c.mu.RLock()
	defer c.mu.RUnlock()
	s := c.workspaces[workspace]
	if s == nil {
		return Page{}
	}
	p := Page{Total: len(s.created)}
	list, order, forward := s.created, byCreation, false
	switch q.Sort {
	case OldestFirst:
		forward = true
	case NameUp:
		list, order, forward = s.names, byName, true
	case NameDown:
		list, order = s.names, byName
	}
	if q.Tail {
		return tail(p, list, !forward, q)
	}
	w := walk{list: list, forward: forward, at: start(list, order, forward, q.After)}
	for e := w.next(); e != nil; e = w.next() {
		if !q.matches(e) {
			continue
		}
		if q.Limit > 0 && len(p.Volumes) == q.Limit {
			last := p.Volumes[len(p.Volumes)-1]
			p.Next = &Position{CreatedAt: last.CreatedAt, Name: last.Name, ID: last.ID}
			return p
		}
		p.Volumes = append(p.Volumes, e.v)
	}
	return p
}

// tail collects the last page by walking the other way round.
func tail(p Page, list []*entry, forward bool, q Query) Page {
	w := walk{list: list, forward: forward, at: start(list, nil, forward, nil)}
	for e := w.next(); e != nil && (q.Limit == 0 || len(p.Volumes) < q.Limit); e = w.next() {
		if q.matches(e) {
			p.Volumes = append(p.Volumes, e.v)
		}
	}
	slices.Reverse(p.Volumes)
	return p
}

// start is the index of the first entry behind a position.
func start(list []*entry, order func(a, b *entry) int, forward bool, after *Position) int {
	if after == nil {
		if forward {
			return 0
		}
		return len(list) - 1
	}
	mark := &entry{v: Volume{ID: after.ID, Name: after.Name, CreatedAt: after.CreatedAt}}
	i, found := slices.BinarySearchFunc(list, mark, order)
	switch {
	case forward && found:
		return i + 1
	case forward:
		return i
	default:
		return i - 1
	}
}

type walk struct {
	list    []*entry
	forward bool
	at      int
}

func (w *walk) next() *entry {
	if w.at < 0 || w.at >= len(w.list) {
		return nil
	}
	e := w.list[w.at]
	if w.forward {
		w.at++
	} else {
		w.at--
	}
	return e
}

func (q *Query) matches(e *entry) bool {
	if q.Search != "" && !strings.Contains(e.text, q.Search) {
		return false
	}
	if q.ExternalID != "" && e.v.ExternalID != q.ExternalID {
		return false
	}
	if len(q.Statuses) > 0 && !slices.Contains(q.Statuses, e.v.Status()) {
		return false
	}
	for key, want := range q.Labels {
		if got, ok := e.v.Labels[key]; !ok || got != want {
			return false
		}
	}
	return true
}

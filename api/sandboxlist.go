package api

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/engine"
)

// listSandboxes follows the rules of listing volumes. There are few sandboxes on
// one machine: a page is cut out of all of them.
func listSandboxes(c *call) error {
	r, err := c.runtime()
	if err != nil {
		return err
	}
	if _, err := flag(c.r.URL.Query(), "showTerminated"); err != nil { // none is kept
		return err
	}
	q, err := c.listQuery()
	if err != nil {
		return err
	}
	all := r.List(c.workspace)
	for i := range all {
		c.locate(&all[i])
	}
	if c.version < version2 {
		return c.json(slices.DeleteFunc(all, func(s Sandbox) bool { return !s.matches(q) }))
	}
	binding := append([]byte("sandboxes\x00"), listBinding(c.workspace, q)...)
	if text := c.r.URL.Query().Get("cursor"); text != "" {
		if q.Tail {
			return invalid("anchor", "is for the first page, not beside a cursor")
		}
		if q.After, err = c.s.openCursor(text, binding); err != nil {
			return err
		}
	}
	data, next := pageOf(all, q)
	list := SandboxList{Data: data, Meta: PageMeta{Total: len(all)}}
	if next != nil {
		list.Meta.HasMore, list.Meta.NextCursor = true, c.s.sealCursor(*next, binding)
	}
	return c.json(list)
}

// pageOf sorts, filters and cuts. The answer is never nil.
func pageOf(all []Sandbox, q engine.Query) (page []Sandbox, next *engine.Position) {
	order := sandboxOrder(q.Sort)
	slices.SortFunc(all, func(a, b Sandbox) int { return order(a.position(), b.position()) })
	page = []Sandbox{}
	for _, s := range all {
		if s.matches(q) && (q.After == nil || order(s.position(), *q.After) > 0) {
			page = append(page, s)
		}
	}
	if q.Limit == 0 || len(page) <= q.Limit {
		return page, nil
	}
	if q.Tail {
		return page[len(page)-q.Limit:], nil
	}
	last := page[q.Limit-1].position()
	return page[:q.Limit], &last
}

func (s Sandbox) position() engine.Position {
	made, _ := time.Parse(time.RFC3339Nano, s.Metadata.CreatedAt) // our own stamp
	return engine.Position{CreatedAt: made, Name: s.Metadata.Name, ID: blockdev.ID(s.Metadata.Name)}
}

func sandboxOrder(sort engine.Sort) func(a, b engine.Position) int {
	byTime := func(a, b engine.Position) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.Name, b.Name))
	}
	byName := func(a, b engine.Position) int { return strings.Compare(a.Name, b.Name) }
	switch sort {
	case engine.OldestFirst:
		return byTime
	case engine.NameUp:
		return byName
	case engine.NameDown:
		return func(a, b engine.Position) int { return byName(b, a) }
	}
	return func(a, b engine.Position) int { return byTime(b, a) }
}

func (s Sandbox) matches(q engine.Query) bool {
	m := s.Metadata
	if q.ExternalID != "" && m.ExternalID != q.ExternalID || len(q.Statuses) > 0 && !slices.Contains(q.Statuses, engine.Status(s.Status)) {
		return false
	}
	text := []string{m.Name, m.DisplayName}
	for key, value := range m.Labels {
		text = append(text, key, value)
	}
	if q.Search != "" && !strings.Contains(strings.ToLower(strings.Join(text, "\x00")), q.Search) {
		return false
	}
	for key, want := range q.Labels {
		if got, ok := m.Labels[key]; !ok || got != want {
			return false
		}
	}
	return true
}

package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"holdfast/blockdev"
)

// TestPagesCoverTheListing walks random catalogs page by page, in every order,
// while volumes come and go, and compares with a plain sort and filter.
func TestPagesCoverTheListing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCatalog()
		n := rapid.IntRange(0, 40).Draw(t, "n")
		var all []Volume
		for i := range n {
			v := Volume{
				ID: blockdev.ID(fmt.Sprintf("vol-%026d", i)), Workspace: space, Name: fmt.Sprintf("v%d", (i*7)%41), Phase: Ready,
				CreatedAt: time.Unix(int64(rapid.IntRange(0, 5).Draw(t, "second")), 0).UTC(),
				Labels:    map[string]string{"parity": fmt.Sprint(i % 2)},
			}
			if !c.add(v) {
				t.Fatalf("add %s", v.Name)
			}
			all = append(all, v)
		}
		if n > 0 && rapid.Bool().Draw(t, "remove") {
			i := rapid.IntRange(0, n-1).Draw(t, "which")
			c.remove(all[i].ID)
			all = slices.Delete(all, i, i+1)
		}
		sort := rapid.SampledFrom([]Sort{"", NewestFirst, OldestFirst, NameUp, NameDown}).Draw(t, "sort")
		q := Query{Sort: sort, Limit: rapid.IntRange(1, 7).Draw(t, "limit")}
		if rapid.Bool().Draw(t, "filtered") {
			q.Labels = map[string]string{"parity": "1"}
		}
		want := expected(all, q)
		var got []string
		for {
			p := c.page(space, q)
			if p.Total != len(all) {
				t.Fatalf("total %d of %d", p.Total, len(all))
			}
			for _, v := range p.Volumes {
				got = append(got, v.Name)
			}
			if p.Next == nil {
				break
			}
			if len(p.Volumes) != q.Limit {
				t.Fatalf("a page of %d with more behind it", len(p.Volumes))
			}
			q.After = p.Next
		}
		if !slices.Equal(got, want) {
			t.Fatalf("got %v\nwant %v", got, want)
		}
		if sort == "" || sort == NewestFirst || sort == OldestFirst {
			q.After, q.Tail = nil, true
			tail := c.page(space, q)
			var names []string
			for _, v := range tail.Volumes {
				names = append(names, v.Name)
			}
			if last := want[max(0, len(want)-q.Limit):]; !slices.Equal(names, last) || tail.Next != nil {
				t.Fatalf("tail %v, want %v", names, last)
			}
		}
	})
}

func expected(all []Volume, q Query) []string {
	var list []Volume
	for _, v := range all {
		if q.Labels == nil || v.Labels["parity"] == "1" {
			list = append(list, v)
		}
	}
	slices.SortFunc(list, func(a, b Volume) int {
		order := cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(string(a.ID), string(b.ID)))
		if q.Sort == NameUp || q.Sort == NameDown {
			order = strings.Compare(a.Name, b.Name)
		}
		if q.Sort == NameUp || q.Sort == OldestFirst {
			return order
		}
		return -order
	})
	var names []string
	for _, v := range list {
		names = append(names, v.Name)
	}
	return names
}

func TestSearchLooksInNamesAndLabels(t *testing.T) {
	c := newCatalog()
	c.add(Volume{ID: "vol-1", Workspace: space, Name: "alpha", DisplayName: "The First", Labels: map[string]string{"Env": "Integration-Test"}})
	c.add(Volume{ID: "vol-2", Workspace: space, Name: "beta"})
	for search, want := range map[string]int{"alph": 1, "first": 1, "env": 1, "integration-test": 1, "eta": 1, "a": 2, "zzz": 0} {
		if got := len(c.page(space, Query{Search: search}).Volumes); got != want {
			t.Errorf("%q finds %d, want %d", search, got, want)
		}
	}
	if got := len(c.page("elsewhere", Query{}).Volumes); got != 0 {
		t.Errorf("another workspace sees %d", got)
	}
}

func BenchmarkPages(b *testing.B) {
	c := newCatalog()
	at := time.Unix(1e9, 0).UTC()
	for i := range 100_000 {
		c.add(Volume{ID: blockdev.ID(fmt.Sprintf("vol-%026d", i)), Workspace: space, Name: fmt.Sprintf("volume-%06d", i), Phase: Ready,
			CreatedAt: at.Add(time.Duration(i) * time.Second), Labels: map[string]string{"env": "test", "n": fmt.Sprint(i)}})
	}
	for name, q := range map[string]Query{
		"first":  {Limit: 50},
		"search": {Limit: 50, Search: "no such text"},
		"tail":   {Limit: 50, Tail: true},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				c.page(space, q)
			}
		})
	}
}

package lvm

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// image is what a test knows of an image; the zero value is none.
type image struct {
	size    int64
	text    string // its description
	content string // at its start
}

// allowed are the states that each image may be found in. A call that was
// acknowledged leaves those after it, one that failed also those before it.
type allowed map[blockdev.ID][]image

func (a allowed) clone() allowed {
	c := allowed{}
	for id, states := range a {
		c[id] = slices.Clone(states)
	}
	return c
}

// after adds what a call does.
func (a allowed) after(c call, acknowledged bool) {
	states := a[c.id]
	if len(states) == 0 {
		states = []image{{}}
	}
	var next []image
	for _, s := range states {
		next = append(next, c.next(s))
	}
	if !acknowledged {
		next = append(next, states...)
	}
	a[c.id] = next
}

// call is one thing that a backend is told to do.
type call struct {
	name string
	id   blockdev.ID
	do   func(t *testing.T, p *Pool) error
	next func(image) image
}

// calls are the life of a few images, in which each call of the backend is told to
// keep something.
func calls() []call {
	var all []call
	add := func(name string, id blockdev.ID, do func(t *testing.T, p *Pool) error, next func(image) image) {
		all = append(all, call{name, id, do, next})
	}
	same := func(i image) image { return i }
	ids := []blockdev.ID{blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume)}
	write := func(id blockdev.ID, content string) func(t *testing.T, p *Pool) error {
		return func(t *testing.T, p *Pool) error { return writeImage(t, p, id, content) }
	}
	a, b, c := ids[0], ids[1], ids[2]
	add("create a", a, func(t *testing.T, p *Pool) error { return p.Create(t.Context(), a, 2<<20) }, same)
	add("write a", a, write(a, "first"), same) // a draft keeps nothing yet
	add("publish a", a, func(t *testing.T, p *Pool) error { return p.Publish(t.Context(), a, []byte("1")) }, func(image) image { return image{2 << 20, "1", "first"} })
	add("clone b", b, func(t *testing.T, p *Pool) error { return p.Clone(t.Context(), b, a, 4<<20) }, same)
	add("publish b", b, func(t *testing.T, p *Pool) error { return p.Publish(t.Context(), b, []byte("b")) }, func(image) image { return image{4 << 20, "b", "first"} })
	add("write a again", a, write(a, "second"), func(i image) image { i.content = "second"; return i })
	add("describe a", a, func(t *testing.T, p *Pool) error { return p.Describe(t.Context(), a, []byte("2")) }, func(i image) image { i.text = "2"; return i })
	add("grow a", a, func(t *testing.T, p *Pool) error { return p.Grow(t.Context(), a, 6<<20) }, func(i image) image { i.size = max(i.size, 6<<20); return i })
	add("create c", c, func(t *testing.T, p *Pool) error { return p.Create(t.Context(), c, 1<<20) }, same)
	add("publish c", c, func(t *testing.T, p *Pool) error { return p.Publish(t.Context(), c, []byte("c")) }, func(image) image { return image{1 << 20, "c", ""} })
	add("remove b", b, func(t *testing.T, p *Pool) error { return p.Remove(t.Context(), b) }, func(image) image { return image{} })
	add("write c", c, write(c, "third"), func(i image) image { i.content = "third"; return i })
	return all
}

// writeImage writes a text to an image's start; it is acknowledged by Close.
func writeImage(t *testing.T, p *Pool, id blockdev.ID, content string) error {
	e, err := p.Open(t.Context(), id, anyBlock)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(e.Path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	block := make([]byte, 4096)
	copy(block, content)
	if _, err = f.Write(block); err == nil {
		err = f.Sync() // only this tells of an error: the last close of a device writes, and says nothing
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return p.Close(t.Context(), id, e.Lease)
}

func readImage(t *testing.T, p *Pool, id blockdev.ID) string {
	t.Helper()
	e, err := p.Open(t.Context(), id, anyBlock)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	f, err := os.Open(e.Path)
	if err == nil {
		_, err = f.Read(b)
		err = errors.Join(err, f.Close())
	}
	if err = errors.Join(err, p.Close(t.Context(), id, e.Lease)); err != nil {
		t.Fatal(err)
	}
	return strings.TrimRight(string(b), "\x00")
}

// holds fails unless every image is in a state that is allowed. Drafts promise
// nothing.
func (a allowed) holds(t *testing.T, p *Pool, when string) {
	t.Helper()
	infos, err := p.List(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	if q, err := p.Quarantined(t.Context()); err != nil || len(q) != 0 {
		t.Errorf("%s: quarantined %v, %v", when, q, err)
	}
	found := map[blockdev.ID]image{}
	for _, i := range infos {
		if _, known := a[i.ID]; !known && !i.Draft {
			t.Errorf("%s: an image that nobody made: %+v", when, i)
		}
		if !i.Draft {
			found[i.ID] = image{i.Size, string(i.Description), readImage(t, p, i.ID)}
		}
	}
	for id, states := range a {
		if !slices.Contains(states, found[id]) {
			t.Errorf("%s: %s is %+v, want one of %+v", when, id, found[id], states)
		}
	}
}

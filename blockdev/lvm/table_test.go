package lvm

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// TestTableKeepsUp: after each of our changes the table is what LVM would report,
// without asking it, and it is asked when somebody else has changed the group.
func TestTableKeepsUp(t *testing.T) {
	place := newPlace(t, "64m")
	p := place.open(t)
	ctx := t.Context()
	one, two := blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume)
	names := func() string {
		rows, err := p.rows(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return summary(rows)
	}
	names()
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"create", func(ctx context.Context) error { return p.Create(ctx, one, 4<<20) }},
		{"create again", func(ctx context.Context) error { return p.Create(ctx, one, 5<<20) }},
		{"publish", func(ctx context.Context) error { return p.Publish(ctx, one, []byte("one")) }},
		{"clone, larger", func(ctx context.Context) error { return p.Clone(ctx, two, one, 8<<20) }},
		{"grow", func(ctx context.Context) error { return p.Grow(ctx, one, 9<<20) }},
		{"remove a draft", func(ctx context.Context) error { return p.Remove(ctx, two) }},
		{"remove an image", func(ctx context.Context) error {
			if err := p.Remove(ctx, one); err != nil {
				return err
			}
			for n := 1; n > 0; {
				var err error
				if n, err = p.Reclaiming(ctx); err != nil {
					return err
				}
			}
			return nil
		}},
	} {
		before := p.state().number
		if err := step.do(ctx); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		t.Logf("%s: %d commits", step.what, p.state().number-before)
		if p.table.stamp != p.state().stamp {
			t.Errorf("%s: LVM has to be asked", step.what)
		}
		have := names()
		p.table.stamp = ""
		if want := names(); have != want {
			t.Errorf("%s: the table has %s, LVM reports %s", step.what, have, want)
		}
	}
	known := p.state()
	sh(t, "lvcreate -qq -y -an -Wn -V 4m -T "+place.name+" -n others")
	p.changed(known, outcome{1, adds(p.fresh("ghost", 1))})
	if got := names(); strings.Contains(got, "ghost") {
		t.Errorf("after a change of somebody else: %s", got)
	}
	if n := textNumber([]byte("vg {\nid = \"x\"\nseqno = 42\n")); n != 42 || textNumber([]byte("seqno = x")) != 0 {
		t.Errorf("number %d", n)
	}
}

func summary(rows []row) string {
	var all []string
	for _, r := range rows {
		all = append(all, r.Name+" "+r.Size)
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// TestNotOurs: a volume of an operator by a name of ours is neither made a draft nor
// renamed nor removed, and an image that lost its description is not made anew.
func TestNotOurs(t *testing.T) {
	place := newPlace(t, "64m")
	p := place.open(t)
	ctx := t.Context()
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	foreign := imagePrefix + string(id)
	sh(t, "lvcreate -qq -y -an -Wn -V 4m -T "+place.name+" -n "+foreign)
	if err := p.Create(ctx, id, 4<<20); !errors.Is(err, blockdev.ErrExists) {
		t.Errorf("create: %v", err)
	}
	if err := p.Remove(ctx, id); err != nil {
		t.Errorf("remove: %v", err)
	}
	if err := p.meta.beginDraft(id); err != nil { // a crash came here
		t.Fatal(err)
	}
	if err := p.Remove(ctx, id); err != nil {
		t.Errorf("remove: %v", err)
	}
	sh(t, "lvs vg/"+foreign)

	lost := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(p.Create(ctx, lost, 4<<20), p.Publish(ctx, lost, []byte("x")), p.meta.forget(lost)); err != nil {
		t.Fatal(err)
	}
	if err := p.Create(ctx, lost, 4<<20); !errors.Is(err, blockdev.ErrExists) {
		t.Errorf("create over an image without a description: %v", err)
	}
	if infos, err := p.List(ctx); err != nil || len(infos) != 0 {
		t.Errorf("list: %v, %v", infos, err)
	}
	if q, err := p.Quarantined(ctx); err != nil || len(q) != 1 {
		t.Errorf("quarantine: %v, %v", q, err)
	}
}

package sparse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/sys"
)

// TestMergeDownStory cuts what brings a small top down into a larger layer, and that into
// a base, at every point between two side effects, by crashes and by errors.
func TestMergeDownStory(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	base := blockdevtest.Ext4Dir(t)
	points := map[string]bool{}
	for _, crash := range []bool{true, false} {
		for cut := 0; ; cut++ {
			point := cutStory(t, filepath.Join(base, fmt.Sprintf("%d-%v", cut, crash)), func(p *Pool) { p.layers = true }, cut, crash, mergeDownStory)
			if point == "" {
				break
			}
			points[point] = true
		}
	}
	for _, point := range []string{"flatten.down", "flatten.base", "flat.link", "flat.flush", "flat.unchain", "flat.sweep"} {
		if !points[point] {
			t.Errorf("no story was cut at %s", point)
		}
	}
	for _, point := range []string{"flatten.absorb", "flatten.hydrate"} {
		if points[point] {
			t.Errorf("something was brought up: %s", point)
		}
	}
}

// blocksFrom are n blocks.
func blocksFrom(first, n int64) (blocks []int64) {
	for i := range n {
		blocks = append(blocks, first+i)
	}
	return blocks
}

func mergeDownStory(m *model) []storyStep {
	vol, first, second := blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixSnapshot), blockdevtest.NewID(blockdev.PrefixSnapshot)
	return []storyStep{
		{vol, func() error { return m.create(vol) }},
		{"", func() error { return m.write(vol, 1, blocksFrom(0, 40)...) }},
		{"", func() error { return m.snapshot(first, vol) }},
		{"", func() error { return m.write(vol, 2, blocksFrom(30, 20)...) }},
		{"", func() error { return m.snapshot(second, vol) }},
		{vol, func() error { return m.grow(vol, modelSize+2*modelBlock) }},
		{"", func() error { return m.write(vol, 3, 5, 35, 65) }},
		{first, func() error { return m.remove(first) }},
		{second, func() error { return m.remove(second) }},
		{"", func() error { return m.pool.emptyTrash(m.t.Context()) }},
		{"", func() error { return m.pool.Flatten(m.t.Context(), vol) }},
		{"", func() error { return m.write(vol, 4, 6, 64) }},
	}
}

// TestNothingGoesDownIntoWhatIsRead: what a snapshot reads from, or somebody else has
// open, is not written.
func TestNothingGoesDownIntoWhatIsRead(t *testing.T) {
	cheapFlushes(t)
	dir := filepath.Join(blockdevtest.Ext4Dir(t), "pool")
	m := newModel(t, dir, func(p *Pool) { p.layers = true })
	vol, snap := blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixSnapshot)
	if err := errors.Join(m.create(vol), m.write(vol, 1, blocksFrom(0, 40)...), m.snapshot(snap, vol), m.write(vol, 2, 3)); err != nil {
		t.Fatal(err)
	}
	goes := func() bool {
		c, err := readChain(vol, m.pool.image(vol))
		if err != nil {
			t.Fatal(err)
		}
		down, err := goesDown(m.pool.image(vol), c)
		if err != nil {
			t.Fatal(err)
		}
		return down
	}
	if goes() {
		t.Error("a snapshot reads from the base")
	}
	c, err := readChain(vol, m.pool.image(vol))
	if err != nil {
		t.Fatal(err)
	}
	reader, err := os.Open(m.pool.image(vol) + "/" + c.Base)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.remove(snap), m.pool.emptyTrash(t.Context())); err != nil {
		t.Fatal(err)
	}
	if goes() {
		t.Error("somebody has the base open")
	}
	if err := reader.Close(); err != nil {
		t.Fatal(err)
	}
	if !goes() {
		t.Error("the base is the volume's alone, and larger than its top")
	}
}

// TestDescentGoesOn: a merge down that gave way goes on where it was, unless somebody has
// written to the image since.
func TestDescentGoesOn(t *testing.T) {
	cheapFlushes(t)
	dir := filepath.Join(blockdevtest.Ext4Dir(t, blockdevtest.Size(256<<20)), "pool")
	m := newModel(t, dir, func(p *Pool) { p.layers = true })
	vol, snap := blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixSnapshot)
	if err := errors.Join(m.create(vol), m.grow(vol, 64<<20), m.write(vol, 1, blocksFrom(0, 8192)...), m.snapshot(snap, vol),
		m.write(vol, 2, blocksFrom(8, 4096)...), m.remove(snap), m.pool.emptyTrash(t.Context())); err != nil {
		t.Fatal(err)
	}
	image := m.pool.image(vol)
	paid := 0
	slice := func(most int) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		paid = 0
		err := m.pool.flattenIn(ctx, vol, image, false, func(n int) error {
			if paid += n; paid >= most {
				cancel()
			}
			return ctx.Err()
		})
		if err != nil && ctx.Err() == nil {
			t.Fatal(err)
		}
	}
	slice(8 << 20)
	got := m.pool.descents[vol]
	if got == nil || got.done < 8<<20 || got.done >= 16<<20 {
		t.Fatalf("after a slice: %+v", got)
	}
	m.check("in the midst", "", "")
	if err := m.write(vol, 3, 9); err != nil { // what is down already
		t.Fatal(err)
	}
	if m.pool.descents[vol] != nil {
		t.Error("it goes on although somebody has written")
	}
	slice(8 << 20)
	slice(1 << 30)
	if paid > 10<<20 {
		t.Errorf("the second slice copied %d bytes", paid)
	}
	if status, err := sys.StatusAt(image + "/" + imageFile); err != nil || status.Links != 1 {
		t.Errorf("%+v, %v", status, err)
	}
	m.check("at the end", "", "")
	m.tidy("at the end")
}

package sparse

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/powercut"
)

// moment is what was acknowledged by then, and what was done next.
type moment struct {
	at     powercut.Moment
	images map[blockdev.ID]*modelImage
	next   act
}

// act is one call: what it may have changed as long as it was not acknowledged.
type act struct {
	name   string
	id     blockdev.ID
	blocks []int64 // that a write of fill reaches
	fill   byte
	do     func() error
}

// TestPowerCutsLayers cuts the power while layered images are written, sealed, cloned,
// merged and grown, at a worker and without: no flushed write is lost, no block of a
// base comes up over a newer one, and no image is half there.
func TestPowerCutsLayers(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.PowerCut)
	blockdevtest.LeakCheck(t)
	rig := powercut.Start(t, 400<<20)
	m := servedModelIn(t, filepath.Join(rig.Dir, "pool"))
	var moments []moment
	note := func(next act) {
		now := map[blockdev.ID]*modelImage{}
		for id, image := range m.images {
			now[id] = image.clone(image.size)
		}
		moments = append(moments, moment{rig.Mark(), now, next})
	}
	for _, a := range m.powerStory() {
		note(a)
		if err := a.do(); err != nil {
			t.Fatalf("%s: %v", a.name, err)
		}
	}
	note(act{})
	m.kept.close()
	rig.Stop(t)

	last := moments[len(moments)-1].at
	cuts := rig.Moments(moments[0].at, last, 8, 3)
	for i := 2; i < len(moments); i += 4 { // right after an acknowledgement a missing flush shows best
		cuts = append(cuts, moments[i].at)
	}
	slices.Sort(cuts)
	for i, at := range slices.Compact(cuts) {
		k := slices.IndexFunc(moments, func(m moment) bool { return m.at > at })
		if k < 0 {
			k = len(moments)
		}
		was := moments[max(k-1, 0)]
		dir := rig.Rebuild(t, at, uint64(i%3*(i+1))) //nolint:gosec // every third time nothing is dropped
		holdsAfterCut(t, filepath.Join(dir, "pool"), was, fmt.Sprintf("cut at %d, before the end of %q", at, was.next.name))
		rig.Discard(t, dir)
	}
}

// holdsAfterCut opens a pool as it was at a cut.
func holdsAfterCut(t *testing.T, dir string, was moment, when string) {
	t.Helper()
	got := newModel(t, dir, func(p *Pool) { p.layers, p.reflinks = true, false })
	defer got.kept.close()
	got.images = map[blockdev.ID]*modelImage{}
	for id, image := range was.images {
		got.images[id] = image.clone(image.size)
	}
	if id := was.next.id; id != "" && len(was.next.blocks) > 0 {
		got.takeWritten(was.next)
	}
	got.removeUnknown()
	got.check(when, was.next.id, was.next.id)
}

// takeWritten takes what there is of blocks that were being written: old or new, by
// themselves.
func (m *model) takeWritten(a act) {
	m.t.Helper()
	b, err := m.pool.Access(m.t.Context(), a.id, true)
	if err != nil {
		m.t.Fatal(err)
	}
	defer b.Close()
	for _, n := range a.blocks {
		one := make([]byte, modelBlock)
		if _, err := b.ReadAt(one, n*modelBlock); err != nil {
			m.t.Fatal(err)
		}
		if one[0] == a.fill {
			m.images[a.id].blocks[n] = a.fill
		}
	}
}

func servedModelIn(t *testing.T, dir string) *model {
	t.Helper()
	m := newModel(t, dir, func(p *Pool) { p.layers, p.reflinks = true, false })
	m.workers = workersFor(t)
	m.reopen()
	return m
}

// powerStory is what is done while the power may go.
func (m *model) powerStory() (story []act) {
	ctx := m.t.Context()
	src, vol, fork := blockdevtest.NewID(blockdev.PrefixSource), blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume)
	var snaps []blockdev.ID
	for range 3 {
		snaps = append(snaps, blockdevtest.NewID(blockdev.PrefixSnapshot))
	}
	var e blockdev.Endpoint
	var client blockdevtest.File
	add := func(name string, id blockdev.ID, do func() error) {
		story = append(story, act{name: name, id: id, do: do})
	}
	write := func(id blockdev.ID, fill byte, blocks ...int64) {
		story = append(story, act{"write", id, blocks, fill, func() error { return m.write(id, fill, blocks...) }})
	}
	put := func(fill byte, blocks ...int64) {
		story = append(story, act{"write at the worker", vol, blocks, fill, func() error { return m.put(client, vol, fill, blocks...) }})
	}
	add("create", src, func() error { return m.create(src) })
	write(src, 1, 0, 1, 2, 3, 4, 5, 60)
	add("clone", vol, func() error { return m.fork(vol, src, modelSize) })
	write(vol, 2, 1, 10)
	add("open", "", func() (err error) {
		if e, err = m.pool.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}); err == nil {
			client = blockdevtest.DialNBD(m.t, e.Path)
		}
		return err
	})
	put(3, 2, 11)
	add("seal at the worker", snaps[0], func() error { return m.snapshot(snaps[0], vol) })
	put(4, 3, 11)
	put(5, 1, 12, 60)
	add("seal again", snaps[1], func() error { return m.snapshot(snaps[1], vol) })
	put(6, 2, 3)
	add("close", "", func() error { return errors.Join(client.Close(), m.pool.Close(ctx, vol, e.Lease)) })
	add("fork", fork, func() error { return m.fork(fork, snaps[0], modelSize+2*modelBlock) })
	write(fork, 7, 4, 65)
	add("remove a snapshot", snaps[0], func() error { return m.remove(snaps[0]) })
	add("flatten", "", func() error { return m.pool.Flatten(ctx, vol) })
	write(vol, 8, 5, 12)
	add("seal a flat one", snaps[2], func() error { return m.snapshot(snaps[2], vol) })
	write(vol, 9, 5, 13)
	add("grow", vol, func() error { return m.grow(vol, modelSize+modelBlock) })
	add("flatten the fork", "", func() error { return m.pool.Flatten(ctx, fork) })
	content, _ := farBytes()
	store := newFarStore(m.t, content)
	rev, far := blockdevtest.NewID(blockdev.PrefixRevision), blockdevtest.NewID(blockdev.PrefixVolume)
	add("create far away", rev, func() error { return m.far(rev, store) })
	add("clone what is far away", far, func() error { return m.fork(far, rev, farModel) })
	write(far, 3, 1, 300)
	add("begin to fetch", "", func() error { return m.flattenPart(far, store) })
	add("fetch", "", func() error { return m.pool.Flatten(ctx, far) })
	return story
}

// put writes through a client, flushed on return.
func (m *model) put(client blockdevtest.File, id blockdev.ID, fill byte, blocks ...int64) error {
	for _, n := range blocks {
		if _, err := client.WriteAt(bytes.Repeat([]byte{fill}, modelBlock), n*modelBlock); err != nil {
			return err
		}
	}
	if err := client.(interface{ Sync() error }).Sync(); err != nil { //nolint:forcetypeassert // it can
		return err
	}
	written := map[int64]byte{}
	for _, n := range blocks {
		written[n] = fill
	}
	maps.Copy(m.images[id].blocks, written)
	return nil
}

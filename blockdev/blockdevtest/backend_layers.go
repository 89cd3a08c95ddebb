package blockdevtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"holdfast/blockdev"
)

// snapshotter gives the backend's Snapshotter, nil where it has none.
func (s *suite) snapshotter() blockdev.Snapshotter {
	s.Helper()
	b, ok := s.b.(blockdev.Snapshotter)
	if !ok && s.place.Snapshots {
		s.Fatal("the backend is no Snapshotter")
	}
	if !s.place.Snapshots {
		return nil
	}
	return b
}

// snapshotOf makes and publishes one.
func (s *suite) snapshotOf(of blockdev.ID) blockdev.ID {
	s.Helper()
	id := NewID(blockdev.PrefixSnapshot)
	_, err := s.snapshotter().Snapshot(s.ctx(), id, of)
	s.ok(err)
	s.ok(s.b.Publish(s.ctx(), id, []byte("snapshot of "+of)))
	return id
}

// forkOf makes and publishes a volume with the bytes of a snapshot.
func (s *suite) forkOf(snap blockdev.ID, size int64) blockdev.ID {
	s.Helper()
	id := NewID(blockdev.PrefixVolume)
	s.ok(s.b.(blockdev.Cloner).Clone(s.ctx(), id, snap, size)) //nolint:forcetypeassert // who has snapshots has forks
	s.ok(s.b.Publish(s.ctx(), id, nil))
	return id
}

// bytesOf reads a closed image, whatever it is made of.
func (s *suite) bytesOf(id blockdev.ID, readOnly bool, fn func(File)) {
	s.Helper()
	accessor, ok := s.b.(blockdev.Accessor)
	if !ok {
		s.used(id, readOnly, fn)
		return
	}
	b, err := accessor.Access(s.ctx(), id, readOnly)
	s.ok(err)
	fn(b)
	s.ok(errors.Join(b.Sync(), b.Close()))
}

// holds fails unless a closed image has a text at a place.
func (s *suite) holds(id blockdev.ID, at int64, text string) {
	s.Helper()
	s.bytesOf(id, true, func(f File) { s.get(f, at, text) })
}

func (s *suite) changed(id blockdev.ID, at int64, text string) {
	s.Helper()
	s.bytesOf(id, false, func(f File) { s.put(f, at, text) })
}

func snapshot(s *suite) {
	b := s.snapshotter()
	if b == nil {
		return
	}
	vol, snap := s.published("at the time"), NewID(blockdev.PrefixSnapshot)
	draft := NewID(blockdev.PrefixVolume)
	s.ok(s.b.Create(s.ctx(), draft, mib))
	for what, of := range map[string]blockdev.ID{"nothing": NewID(blockdev.PrefixVolume), "a draft": draft} {
		_, err := b.Snapshot(s.ctx(), snap, of)
		s.is(err, blockdev.ErrNotFound, "snapshot of "+what)
		s.absent(snap)
	}
	for range 2 { // the second time over a draft from an attempt before
		_, err := b.Snapshot(s.ctx(), snap, vol)
		s.ok(err)
		if info := s.stat(snap); !info.Draft || info.Size != mib {
			s.Errorf("a snapshot: %+v", info)
		}
	}
	s.ok(s.b.Publish(s.ctx(), snap, []byte("snapshot")))
	_, err := b.Snapshot(s.ctx(), snap, vol)
	s.is(err, blockdev.ErrExists, "snapshot over an image")
	if info := s.stat(vol); info.Draft || info.Size != mib || string(info.Description) != "description of at the time" {
		s.Errorf("a volume with a snapshot: %+v", info)
	}
	s.changed(vol, 0, "later")
	s.changed(vol, 8192, "later still")
	fork := s.forkOf(snap, 2*mib)
	s.changed(fork, mib-4096, "the fork's")
	s.restart()
	s.isSnapshot(snap)
	s.holds(vol, 0, "later")
	s.holds(vol, mib-4096, "at the time")
	s.ok(s.b.Remove(s.ctx(), vol))
	s.isSnapshot(snap)
	s.ok(s.b.Remove(s.ctx(), snap))
	s.absent(snap)
	s.holds(fork, 0, "at the time")
	s.holds(fork, 8192, "")
	s.holds(fork, mib-4096, "the fork's")
	s.holds(fork, 2*mib-4096, "")
}

// isSnapshot fails unless it reads as when snapshot made it.
func (s *suite) isSnapshot(id blockdev.ID) {
	s.Helper()
	s.holds(id, 0, "at the time")
	s.holds(id, 8192, "")
	s.holds(id, mib-4096, "at the time")
	if info := s.stat(id); info.Draft || info.Size != mib || string(info.Description) != "snapshot" {
		s.Errorf("a snapshot: %+v", info)
	}
}

func snapshotOpen(s *suite) {
	if s.snapshotter() == nil {
		return
	}
	for _, kind := range s.place.Kinds {
		vol, snap := s.published("at the time"), NewID(blockdev.PrefixSnapshot)
		e, err := s.b.Open(s.ctx(), vol, blockdev.Want{Kinds: []blockdev.Kind{kind}})
		s.ok(err)
		f := s.place.Access(s.T, e)
		s.put(f, 4096, "flushed")
		s.ok(flushed(f))
		_, err = s.snapshotter().Snapshot(s.ctx(), snap, vol)
		if s.place.Layered && (kind == blockdev.File || kind == blockdev.Block) {
			s.is(err, errors.ErrUnsupported, "snapshot of a file in use, without reflink")
			s.absent(snap)
			s.ok(f.Close())
			s.close(vol, e)
			continue
		}
		s.ok(err)
		s.ok(s.b.Publish(s.ctx(), snap, nil))
		s.put(f, 4096, "written after")
		s.get(f, 0, "at the time")
		again, err := s.b.Open(s.ctx(), vol, blockdev.Want{Kinds: []blockdev.Kind{kind}})
		if err != nil || again != e {
			s.Errorf("a snapshot changed the opening %+v to %+v, %v", e, again, err)
		}
		s.holds(snap, 4096, "flushed")
		s.ok(f.Close())
		s.close(vol, e)
		s.restart()
		s.holds(snap, 0, "at the time")
		s.holds(snap, 4096, "flushed")
		s.holds(vol, 4096, "written after")
	}
}

// flushed has a device write what it was given.
func flushed(f File) error {
	if c, ok := f.(interface{ Sync() error }); ok {
		return c.Sync()
	}
	return nil
}

// snapshotsInAnyOrder has snapshots of a volume and of its forks go in some order:
// what is left reads as it did.
func snapshotsInAnyOrder(s *suite) {
	if s.snapshotter() == nil || s.place.Slow {
		return
	}
	const rounds = 6
	r := rand.New(rand.NewPCG(1, 2))
	want := map[blockdev.ID]int{}
	vol := s.published("round 0")
	for i := range rounds {
		s.changed(vol, 0, fmt.Sprintf("round %d", i))
		snap := s.snapshotOf(vol)
		want[snap] = i
		if i%2 == 1 { // the line goes on with the fork
			vol = s.forkOf(snap, mib)
		}
	}
	for len(want) > 0 {
		ids := make([]blockdev.ID, 0, len(want))
		for id, round := range want {
			s.holds(id, 0, fmt.Sprintf("round %d", round))
			s.holds(id, mib-4096, "round 0")
			ids = append(ids, id)
		}
		slices.Sort(ids)
		gone := ids[r.IntN(len(ids))]
		s.ok(s.b.Remove(s.ctx(), gone))
		delete(want, gone)
		s.restart()
	}
	s.holds(vol, 0, fmt.Sprintf("round %d", rounds-1))
	s.holds(vol, mib-4096, "round 0")
}

// flatten has a layered image become one that opens as anything.
func flatten(s *suite) {
	if !s.place.Layered {
		return
	}
	b, ok := s.b.(blockdev.Flattener)
	if !ok {
		s.Fatal("the backend is no Flattener")
	}
	s.is(b.Flatten(s.ctx(), NewID(blockdev.PrefixVolume)), blockdev.ErrNotFound, "flatten nothing")
	src := s.publishedAs(blockdev.PrefixSource, "base")
	s.ok(b.Flatten(s.ctx(), src))
	id := s.forkOf(src, 2*mib)
	s.changed(id, 4096, "of its own")
	if info := s.stat(id); info.Layers == 0 || info.Absent <= 0 || info.Absent > info.Size {
		s.Errorf("a layered image: %+v", info)
	}
	file := blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block, blockdev.File}}
	_, err := s.b.Open(s.ctx(), id, file)
	s.is(err, blockdev.ErrLayered, "open a layered image as a file")
	canceled, cancel := context.WithCancel(s.ctx())
	cancel()
	s.is(b.Flatten(canceled, id), context.Canceled, "flatten when it is over")
	if slices.Contains(s.place.Kinds, blockdev.NBD) {
		e, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
		s.ok(err)
		s.is(b.Flatten(s.ctx(), id), blockdev.ErrBusy, "flatten an open image")
		s.close(id, e)
	}
	s.ok(b.Flatten(s.ctx(), id))
	s.ok(b.Flatten(s.ctx(), id))
	if info := s.stat(id); info.Layers != 0 || info.Absent != 0 || info.Size != 2*mib {
		s.Errorf("a flat image: %+v", info)
	}
	s.ok(s.b.Remove(s.ctx(), src))
	s.restart()
	e, err := s.b.Open(s.ctx(), id, file)
	s.ok(err)
	s.close(id, e)
	for at, text := range map[int64]string{0: "base", 4096: "of its own", mib - 4096: "base", mib: ""} {
		s.holds(id, at, text)
	}
}

func access(s *suite) {
	b, ok := s.b.(blockdev.Accessor)
	if !ok {
		return
	}
	_, err := b.Access(s.ctx(), NewID(blockdev.PrefixVolume), true)
	s.is(err, blockdev.ErrNotFound, "access nothing")
	vol := s.published("text")
	e := s.open(vol, false)
	_, err = b.Access(s.ctx(), vol, true)
	s.is(err, blockdev.ErrBusy, "access of an open image")
	s.close(vol, e)
	w, err := b.Access(s.ctx(), vol, false)
	s.ok(err)
	if w.Size() != mib {
		s.Errorf("%d bytes", w.Size())
	}
	_, err = s.b.Open(s.ctx(), vol, blockdev.Want{Kinds: s.place.Kinds})
	s.is(err, blockdev.ErrBusy, "open beside an access")
	s.is(s.b.Remove(s.ctx(), vol), blockdev.ErrBusy, "remove beside an access")
	s.put(w, 4096, "through it")
	if _, err := w.WriteAt(make([]byte, 8192), mib-4096); err == nil {
		s.Error("written past the end")
	}
	s.ok(errors.Join(w.Sync(), w.Close()))
	r, err := b.Access(s.ctx(), vol, true)
	s.ok(err)
	s.get(r, 0, "text")
	s.get(r, 4096, "through it")
	if _, err := r.WriteAt(make([]byte, 4096), 0); err == nil {
		s.Error("written though read-only")
	}
	s.ok(r.Close())
	if !s.place.Snapshots {
		return
	}
	snap := s.snapshotOf(vol)
	if s.place.Layered {
		_, err = b.Access(s.ctx(), snap, false)
		s.is(err, blockdev.ErrInvalid, "access for writing to a snapshot")
	}
	s.reads(vol, 4096, "through it")
}

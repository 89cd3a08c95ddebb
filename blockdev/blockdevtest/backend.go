package blockdevtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"

	"holdfast/blockdev"
)

// File is access to the bytes of an open image.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
}

// Place is where a backend keeps images, for TestBackend.
type Place struct {
	// Open gives a fresh backend on the place, as a new process finds it after the
	// death of the one before: the backend given before is not used any more.
	Open func(t *testing.T) blockdev.Backend
	// Damage spoils the description of a published, closed image.
	Damage func(t *testing.T, id blockdev.ID)
	// Access opens an endpoint's bytes. nil: its path, as a file or a node.
	Access func(t *testing.T, e blockdev.Endpoint) File
	// Kinds are the kinds of endpoint that the backend gives.
	Kinds []blockdev.Kind
	// Grain is what sizes are rounded up to, in bytes; a divisor of 1 MiB. 0: they
	// are not.
	Grain int64
	// Slow says that a call takes a good part of a second: fewer at once will do.
	Slow bool
	// Clones says whether Clone works here; if not it must answer
	// errors.ErrUnsupported and leave nothing.
	Clones bool
	// Snapshots says that Snapshot works here. Else the backend has none.
	Snapshots bool
	// Layered says that what Clone makes is layered, as is an image with a snapshot;
	// one that is open as File or Block has none then, and the source of a clone is
	// not written.
	Layered bool
}

// mib is the size of the suite's images: large enough for every filesystem block.
const mib = 1 << 20

// TestBackend holds a backend to every promise of blockdev.Backend. newPlace
// makes an empty place; each subtest gets its own.
func TestBackend(t *testing.T, newPlace func(t *testing.T) Place) {
	for _, test := range []struct {
		name string
		run  func(*suite)
	}{
		{"life of an image", life},
		{"arguments", arguments},
		{"create again", createAgain},
		{"publish", publish},
		{"describe", describe},
		{"grow", grow},
		{"grow while open", growOpen},
		{"open again", openAgain},
		{"open otherwise", openOtherwise},
		{"stale lease", staleLease},
		{"read only", readOnly},
		{"limits of a worker", limitsOfWorker},
		{"busy device", busyDevice},
		{"remove", remove},
		{"list", list},
		{"quarantine", quarantine},
		{"clone", clone},
		{"clone grown", cloneGrown},
		{"snapshot", snapshot},
		{"snapshot while open", snapshotOpen},
		{"snapshots in any order", snapshotsInAnyOrder},
		{"flatten", flatten},
		{"access", access},
		{"trim", trim},
		{"found after a restart", foundAgain},
		{"drafts after a restart", draftsAfterRestart},
		{"open device after a restart", openAfterRestart},
		{"canceled", canceled},
		{"many at once", manyAtOnce},
	} {
		t.Run(test.name, func(t *testing.T) {
			place := newPlace(t)
			if place.Access == nil {
				place.Access = accessPath
			}
			test.run(&suite{T: t, place: place, b: place.Open(t)})
		})
	}
}

func accessPath(t *testing.T, e blockdev.Endpoint) File {
	t.Helper()
	flag := os.O_RDWR
	if e.ReadOnly {
		flag = os.O_RDONLY
	}
	f, err := os.OpenFile(e.Path, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	return syncedFile{f}
}

// syncedFile flushes at its end: a device's cache is written when it is closed,
// and only a flush tells whether that worked.
type syncedFile struct{ *os.File }

func (f syncedFile) Close() error { return errors.Join(f.Sync(), f.File.Close()) }

// suite is one test on one place.
type suite struct {
	*testing.T
	place Place
	b     blockdev.Backend
}

func (s *suite) ctx() context.Context { return s.T.Context() }

func (s *suite) ok(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// is fails unless err is the sentinel, through errors.Is alone.
func (s *suite) is(err, sentinel error, what string) {
	s.Helper()
	if !errors.Is(err, sentinel) {
		s.Errorf("%s: %v, want %v", what, err, sentinel)
	}
	if err == sentinel { //nolint:errorlint // this is what is tested
		s.Errorf("%s: a bare sentinel, without operation and image", what)
	}
}

// rounded is the size of an image of which size bytes were asked for.
func (s *suite) rounded(size int64) int64 {
	if s.place.Grain == 0 {
		return size
	}
	return (size + s.place.Grain - 1) / s.place.Grain * s.place.Grain
}

func (s *suite) restart() {
	s.Helper()
	s.b = s.place.Open(s.T)
}

// published makes an image with a text at its start and at its end.
func (s *suite) published(text string) blockdev.ID {
	s.Helper()
	return s.publishedAs(blockdev.PrefixVolume, text)
}

func (s *suite) publishedAs(prefix, text string) blockdev.ID {
	s.Helper()
	id := NewID(prefix)
	s.ok(s.b.Create(s.ctx(), id, mib))
	s.write(id, 0, text)
	s.write(id, mib-4096, text)
	s.ok(s.b.Publish(s.ctx(), id, []byte("description of "+text)))
	return id
}

func (s *suite) open(id blockdev.ID, readOnly bool) blockdev.Endpoint {
	s.Helper()
	e, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: s.place.Kinds, ReadOnly: readOnly})
	s.ok(err)
	return e
}

func (s *suite) close(id blockdev.ID, e blockdev.Endpoint) {
	s.Helper()
	s.ok(s.b.Close(s.ctx(), id, e.Lease))
}

// used opens an image, lets fn use its bytes and closes it.
func (s *suite) used(id blockdev.ID, readOnly bool, fn func(File)) {
	s.Helper()
	e := s.open(id, readOnly)
	f := s.place.Access(s.T, e)
	fn(f)
	s.ok(f.Close())
	s.close(id, e)
}

// grown gives access to an image that has grown: an NBD client was told the size when it
// came.
func (s *suite) grown(e blockdev.Endpoint, f File) File {
	s.Helper()
	if e.Kind != blockdev.NBD {
		return f
	}
	s.ok(f.Close())
	return s.place.Access(s.T, e)
}

// way is how a closed image is read and written: opened, where each opens.
func (s *suite) way() func(blockdev.ID, bool, func(File)) {
	if s.place.Layered {
		return s.bytesOf
	}
	return s.used
}

func (s *suite) write(id blockdev.ID, at int64, text string) {
	s.Helper()
	s.way()(id, false, func(f File) { s.put(f, at, text) })
}

func (s *suite) put(f File, at int64, text string) {
	s.Helper()
	block := make([]byte, 4096)
	copy(block, text)
	if _, err := f.WriteAt(block, at); err != nil {
		s.Fatal(err)
	}
}

func (s *suite) reads(id blockdev.ID, at int64, text string) {
	s.Helper()
	s.way()(id, true, func(f File) { s.get(f, at, text) })
}

func (s *suite) get(f File, at int64, text string) {
	s.Helper()
	got, want := make([]byte, 4096), make([]byte, 4096)
	copy(want, text)
	if _, err := f.ReadAt(got, at); err != nil && !errors.Is(err, io.EOF) {
		s.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		s.Errorf("at %d: %.40q, want %q and zeroes", at, got, text)
	}
}

func (s *suite) stat(id blockdev.ID) blockdev.Info {
	s.Helper()
	info, err := s.b.Stat(s.ctx(), id)
	s.ok(err)
	return info
}

func (s *suite) absent(id blockdev.ID) {
	s.Helper()
	_, err := s.b.Stat(s.ctx(), id)
	s.is(err, blockdev.ErrNotFound, "stat of an absent image")
	if slices.Contains(s.listed(), id) {
		s.Errorf("%s is listed", id)
	}
}

func (s *suite) listed() (ids []blockdev.ID) {
	s.Helper()
	infos, err := s.b.List(s.ctx())
	s.ok(err)
	for _, info := range infos {
		ids = append(ids, info.ID)
	}
	return ids
}

func life(s *suite) {
	id := NewID(blockdev.PrefixVolume)
	s.absent(id)
	s.ok(s.b.Create(s.ctx(), id, mib))
	if info := s.stat(id); !info.Draft || info.Size != mib || info.Description != nil || info.Open {
		s.Errorf("a draft: %+v", info)
	}
	s.used(id, false, func(f File) {
		s.get(f, 0, "")
		s.get(f, mib-4096, "")
		s.put(f, 8192, "data")
	})
	s.ok(s.b.Publish(s.ctx(), id, []byte("says what it is")))
	info := s.stat(id)
	if info.Draft || info.Size != mib || string(info.Description) != "says what it is" || info.Allocated <= 0 || info.Allocated >= mib {
		s.Errorf("an image: %+v", info)
	}
	s.reads(id, 8192, "data")
	s.reads(id, 0, "")
	capacity, err := s.b.Capacity(s.ctx())
	s.ok(err)
	if capacity.Total <= 0 || capacity.Free <= 0 || capacity.Allocated != capacity.Total-capacity.Free || capacity.Trash < 0 {
		s.Errorf("capacity %+v", capacity)
	}
	s.ok(s.b.Remove(s.ctx(), id))
	s.absent(id)
	s.ok(s.b.Remove(s.ctx(), id))
}

func arguments(s *suite) {
	id := NewID(blockdev.PrefixVolume)
	for _, size := range []int64{0, -1, -512, 511, mib + 1} {
		s.is(s.b.Create(s.ctx(), id, size), blockdev.ErrInvalid, fmt.Sprintf("create of %d bytes", size))
	}
	s.absent(id)
	s.ok(s.b.Create(s.ctx(), id, mib))
	s.is(s.b.Grow(s.ctx(), id, -512), blockdev.ErrInvalid, "grow to -512")
	_, err := s.b.Open(s.ctx(), id, blockdev.Want{})
	s.is(err, blockdev.ErrInvalid, "open as nothing")
	_, err = s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{"nonsense"}})
	s.is(err, errors.ErrUnsupported, "open as nonsense")
	for _, bad := range []blockdev.ID{"", "x", "../../etc/passwd", "vol-/", id + "x", "VOL" + id[3:], "."} {
		_, statErr := s.b.Stat(s.ctx(), bad)
		_, openErr := s.b.Open(s.ctx(), bad, blockdev.Want{Kinds: s.place.Kinds})
		for what, err := range map[string]error{
			"create": s.b.Create(s.ctx(), bad, mib), "publish": s.b.Publish(s.ctx(), bad, nil),
			"describe": s.b.Describe(s.ctx(), bad, nil), "grow": s.b.Grow(s.ctx(), bad, mib),
			"close": s.b.Close(s.ctx(), bad, "x"), "remove": s.b.Remove(s.ctx(), bad), "stat": statErr, "open": openErr,
		} {
			s.is(err, blockdev.ErrInvalid, fmt.Sprintf("%s of %q", what, bad))
		}
	}
	if got := s.listed(); len(got) != 1 || got[0] != id {
		s.Errorf("listed %v", got)
	}
}

func createAgain(s *suite) {
	id := NewID(blockdev.PrefixVolume)
	s.ok(s.b.Create(s.ctx(), id, mib))
	s.write(id, 0, "from before")
	s.ok(s.b.Create(s.ctx(), id, 2*mib))
	if info := s.stat(id); info.Size != 2*mib {
		s.Errorf("made anew: %+v", info)
	}
	s.reads(id, 0, "")
	e := s.open(id, false)
	s.is(s.b.Create(s.ctx(), id, mib), blockdev.ErrBusy, "create over an open draft")
	s.close(id, e)
	s.ok(s.b.Publish(s.ctx(), id, nil))
	s.is(s.b.Create(s.ctx(), id, mib), blockdev.ErrExists, "create over an image")
	if info := s.stat(id); info.Draft || info.Size != 2*mib {
		s.Errorf("after a refused create: %+v", info)
	}
}

func publish(s *suite) {
	id := NewID(blockdev.PrefixVolume)
	s.is(s.b.Publish(s.ctx(), id, nil), blockdev.ErrNotFound, "publish of nothing")
	s.ok(s.b.Create(s.ctx(), id, mib))
	e := s.open(id, false)
	f := s.place.Access(s.T, e)
	s.put(f, 0, "written while open")
	s.ok(s.b.Publish(s.ctx(), id, []byte("1")))
	s.put(f, 4096, "written after")
	s.ok(f.Close())
	s.close(id, e)
	s.reads(id, 0, "written while open")
	s.reads(id, 4096, "written after")
	s.ok(s.b.Publish(s.ctx(), id, []byte("2")))
	if info := s.stat(id); string(info.Description) != "2" || info.Draft {
		s.Errorf("published twice: %+v", info)
	}
	s.reads(id, 0, "written while open")
}

func describe(s *suite) {
	id := NewID(blockdev.PrefixVolume)
	s.is(s.b.Describe(s.ctx(), id, nil), blockdev.ErrNotFound, "describe nothing")
	s.ok(s.b.Create(s.ctx(), id, mib))
	s.is(s.b.Describe(s.ctx(), id, nil), blockdev.ErrNotFound, "describe a draft")
	s.ok(s.b.Publish(s.ctx(), id, nil))
	for _, text := range []string{"", "\n", "{}", "two\nlines\n", "\x00\xff", string(bytes.Repeat([]byte("long "), 20_000))} {
		s.ok(s.b.Describe(s.ctx(), id, []byte(text)))
		s.restart()
		if info := s.stat(id); string(info.Description) != text {
			s.Errorf("description %.20q came back as %.20q", text, info.Description)
		}
		infos, err := s.b.List(s.ctx())
		s.ok(err)
		if len(infos) != 1 || string(infos[0].Description) != text {
			s.Errorf("description %.20q is listed as %+v", text, infos)
		}
	}
}

func grow(s *suite) {
	missing := NewID(blockdev.PrefixVolume)
	s.is(s.b.Grow(s.ctx(), missing, mib), blockdev.ErrNotFound, "grow nothing")
	id := s.published("old")
	for _, step := range []struct{ to, want int64 }{{3 * mib, 3 * mib}, {3 * mib, 3 * mib}, {mib, 3 * mib}, {3*mib + 512, s.rounded(3*mib + 512)}} {
		s.ok(s.b.Grow(s.ctx(), id, step.to))
		if info := s.stat(id); info.Size != step.want {
			s.Errorf("grown to %d: %d bytes, want %d", step.to, info.Size, step.want)
		}
	}
	s.reads(id, mib-4096, "old")
	s.reads(id, mib, "")
	s.reads(id, 3*mib-4096, "")
	draft := NewID(blockdev.PrefixVolume)
	s.ok(s.b.Create(s.ctx(), draft, mib))
	s.ok(s.b.Grow(s.ctx(), draft, 2*mib))
	if info := s.stat(draft); info.Size != 2*mib || !info.Draft {
		s.Errorf("a grown draft: %+v", info)
	}
}

func growOpen(s *suite) {
	id := s.published("old")
	e := s.open(id, false)
	f := s.place.Access(s.T, e)
	s.ok(s.b.Grow(s.ctx(), id, 2*mib))
	f = s.grown(e, f)
	s.put(f, 2*mib-4096, "new end")
	s.get(f, mib, "")
	s.get(f, 0, "old")
	s.ok(f.Close())
	again := s.open(id, false)
	if again.Size != 2*mib || again.Lease != e.Lease || again.Path != e.Path {
		s.Errorf("the opening %+v became %+v", e, again)
	}
	s.close(id, again)
	s.reads(id, 2*mib-4096, "new end")
}

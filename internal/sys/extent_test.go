package sys_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/sys"
)

func newFile(t *testing.T, dir, name string, content []byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	return f
}

func contentOf(t *testing.T, f *os.File) []byte {
	t.Helper()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mapped(t *testing.T, f *os.File, max int) sys.Mapped {
	t.Helper()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	m, err := sys.MapFile(f, max)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestCloneSharesUntilWritten(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool)
	blockdevtest.LeakCheck(t)
	dir := blockdevtest.ReflinkDir(t)
	text := bytes.Repeat([]byte("0123456789abcdef"), 4096) // 64 KiB
	src, dst := newFile(t, dir, "src", text), newFile(t, dir, "dst", nil)
	if m := mapped(t, src, 100); m.Allocated != 64<<10 || m.Shared != 0 || !m.Complete {
		t.Errorf("before the clone: %+v", m)
	}
	if err := sys.CloneFile(dst, src); err != nil {
		t.Fatal(err)
	}
	if m := mapped(t, dst, 100); m.Allocated != 64<<10 || m.Shared != 64<<10 {
		t.Errorf("a clone: %+v", m)
	}
	if _, err := dst.WriteAt(make([]byte, 4096), 8192); err != nil {
		t.Fatal(err)
	}
	if m := mapped(t, dst, 100); m.Allocated != 64<<10 || m.Shared != 60<<10 || m.Extents != 3 || !m.Complete {
		t.Errorf("after a write: %+v", m)
	}
	if m := mapped(t, dst, 2); m.Extents != 2 || m.Complete || m.Shared != 8192 {
		t.Errorf("of two extents: %+v", m)
	}
	if !bytes.Equal(contentOf(t, src), text) {
		t.Error("the source has changed")
	}
	part := newFile(t, dir, "part", make([]byte, 64<<10))
	if err := sys.CloneRange(part, 4096, src, 8192, 4096); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 64<<10)
	copy(want[4096:], text[8192:12288])
	if !bytes.Equal(contentOf(t, part), want) {
		t.Error("a cloned range differs")
	}
}

func TestMapManyExtents(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool)
	f := newFile(t, blockdevtest.ReflinkDir(t), "f", nil)
	const extents = 300                                    // more than one call gives
	if err := f.Truncate(extents * 64 << 10); err != nil { // within the file XFS does not allocate in advance
		t.Fatal(err)
	}
	for i := range int64(extents) {
		if _, err := f.WriteAt([]byte("x"), i*64<<10); err != nil {
			t.Fatal(err)
		}
	}
	if m := mapped(t, f, 10_000); m.Extents != extents || !m.Complete || m.Allocated < extents*4096 {
		t.Errorf("%+v, want %d extents", m, extents)
	}
	if m := mapped(t, f, 200); m.Extents != 200 || m.Complete {
		t.Errorf("%+v, want 200 extents", m)
	}
}

func TestNoReflink(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool, blockdevtest.Ext4)
	plain, xfs := blockdevtest.Ext4Dir(t), blockdevtest.ReflinkDir(t)
	a, b, c := newFile(t, plain, "a", []byte("x")), newFile(t, plain, "b", nil), newFile(t, xfs, "c", nil)
	for what, dst := range map[string]*os.File{"on ext4": b, "across filesystems": c} {
		err := sys.CloneFile(dst, a)
		if err == nil || !sys.IsNoReflink(err) {
			t.Errorf("clone %s: %v", what, err)
		}
		var bare syscall.Errno
		if !errors.As(err, &bare) || err == error(bare) { //nolint:errorlint // this is what is tested
			t.Errorf("clone %s: %#v is not wrapped", what, err)
		}
	}
	if sys.IsNoReflink(syscall.EIO) || sys.IsNoReflink(syscall.ENOSPC) {
		t.Error("a real error counts as a missing feature")
	}
}

func TestDataHolesAndSpace(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool)
	f := newFile(t, blockdevtest.ReflinkDir(t), "f", nil)
	if _, ok, err := sys.NextData(f, 0); ok || err != nil {
		t.Errorf("data in an empty file: %v, %v", ok, err)
	}
	if err := sys.Allocate(f, 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if s, err := sys.StatusOf(f); err != nil || s.Size != 1<<20 || s.Allocated < 1<<20 {
		t.Errorf("allocated: %+v, %v", s, err)
	}
	data := bytes.Repeat([]byte{1}, 1<<20)
	if _, err := f.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := sys.PunchHole(f, 256<<10, 128<<10); err != nil {
		t.Fatal(err)
	}
	clear(data[256<<10 : 384<<10])
	if err := sys.ZeroRange(f, 512<<10, 64<<10); err != nil {
		t.Fatal(err)
	}
	clear(data[512<<10 : 576<<10])
	if !bytes.Equal(contentOf(t, f), data) {
		t.Error("wrong content")
	}
	if at, err := sys.NextHole(f, 0); err != nil || at != 256<<10 {
		t.Errorf("first hole at %d, %v", at, err)
	}
	if at, ok, err := sys.NextData(f, 256<<10); err != nil || !ok || at != 384<<10 {
		t.Errorf("next data at %d, %v, %v", at, ok, err)
	}
	if s, err := sys.StatusOf(f); err != nil || s.Size != 1<<20 || s.Allocated != 1<<20-128<<10 {
		t.Errorf("punched: %+v, %v", s, err)
	}
	err := sys.Allocate(f, 0, 1<<40)
	if !sys.IsNoSpace(err) {
		t.Errorf("allocating a tebibyte: %v", err)
	}
}

func TestCopyRange(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool)
	text := bytes.Repeat([]byte("copy"), 1024)
	for name, dir := range map[string]string{"temp": t.TempDir(), "xfs": blockdevtest.ReflinkDir(t)} {
		src, dst := newFile(t, dir, "src", text), newFile(t, dir, "dst", nil)
		n, err := sys.CopyRange(dst, 0, src, 0, 1<<40)
		if err != nil || n != int64(len(text)) || !bytes.Equal(contentOf(t, dst), text) {
			t.Errorf("%s: copied %d, %v", name, n, err)
		}
		if n, err := sys.CopyRange(dst, 0, src, int64(len(text)), 10); n != 0 || err != nil {
			t.Errorf("%s: behind the end: %d, %v", name, n, err)
		}
	}
}

func TestRenameNewReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := sys.RenameNew(dir+"/a", dir+"/b"); !errors.Is(err, os.ErrExist) {
		t.Errorf("over an empty directory: %v", err)
	}
	if err := sys.RenameNew(dir+"/a", dir+"/c"); err != nil {
		t.Error(err)
	}
	if err := sys.RenameNew(dir+"/a", dir+"/d"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	if err := sys.SyncDir(dir); err != nil {
		t.Error(err)
	}
	if err := sys.SyncDir(dir + "/nothing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("flush of nothing: %v", err)
	}
}

func TestLockIsOfTheOpening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var openings [2]*os.File
	for i := range openings {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		openings[i] = f
	}
	if err := sys.LockFile(openings[0]); err != nil {
		t.Fatal(err)
	}
	if err := sys.LockFile(openings[1]); !errors.Is(err, sys.ErrLocked) {
		t.Errorf("a second opening in the same process: %v", err)
	}
	// Closing another descriptor of the file must not drop it, as it would with a
	// lock of the process.
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	if err := sys.LockFile(openings[1]); !errors.Is(err, sys.ErrLocked) {
		t.Errorf("after a foreign close: %v", err)
	}
	openings[0].Close()
	if err := sys.LockFile(openings[1]); err != nil {
		t.Errorf("after the holder's close: %v", err)
	}
}

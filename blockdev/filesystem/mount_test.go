package filesystem

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// mounted mounts an image through a loop device until the test ends or the
// function that it gives is called.
func mounted(t *testing.T, path string, t2 Type, options ...string) (dir string, unmount func()) {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop)
	dir = filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	args := []string{"-t", string(t2), "-o", "loop"}
	for _, o := range options {
		args[3] += "," + o
	}
	command(t, "mount", append(args, path, dir)...)
	done := false
	unmount = func() {
		t.Helper()
		if !done {
			done = true
			command(t, "umount", dir)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

func command(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return out
}

// copyImage clones (or copies the data of) an image.
func copyImage(t *testing.T, path string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	command(t, "cp", "--reflink=auto", "--sparse=always", path, to)
	return to
}

func writeFile(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o640); err != nil {
		t.Fatal(err)
	}
}

// TestClonesMountAtOnce identifies copies of one image that was used before,
// mounts them all at the same time, cuts their power, recovers them, and lets
// the checker judge.
func TestClonesMountAtOnce(t *testing.T) {
	for _, typ := range []Type{Ext4, XFS, Btrfs} {
		t.Run(string(typ), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			x := NewTools()
			original := blank(t, 512*MiB)
			check(t, x.Make(t.Context(), original, typ, MakeOptions{}))
			dir, unmount := mounted(t, original, typ)
			for i := range 100 {
				writeFile(t, filepath.Join(dir, string(rune('0'+i))), bytes.Repeat([]byte{byte(i)}, 10000))
			}
			unmount()
			uuids := []string{"01234567-89ab-4cde-8f01-23456789abcd", "fedcba98-7654-4210-8123-456789abcdef"}
			var clones []*clone
			for _, uuid := range uuids {
				c := &clone{path: copyImage(t, original), typ: typ, uuid: uuid}
				// Twice: a clone of a clone is identified again.
				check(t, x.Identify(t.Context(), c.path, typ, uuids[1]))
				check(t, x.Identify(t.Context(), c.path, typ, uuid))
				check(t, x.Check(t.Context(), c.path, typ, false))
				asBytes(t, x, copyImage(t, original), c)
				c.dir, c.unmount = mounted(t, c.path, typ)
				clones = append(clones, c)
			}
			_, unmount = mounted(t, original, typ)
			for _, c := range clones {
				c.use(t, x)
			}
			unmount()
		})
	}
}

// asBytes does to a copy, as bytes, what was done to the clone of the same original,
// and finds in it what the path shows.
func asBytes(t *testing.T, x Tools, path string, c *clone) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	check(t, err)
	defer f.Close()
	image := struct{ Image }{f}
	size, err := x.SizeIn(t.Context(), image, c.typ)
	check(t, err)
	if at, err := x.Size(t.Context(), path, c.typ); err != nil || at != size {
		t.Errorf("as bytes %d, as a file %d, %v", size, at, err)
	}
	check(t, x.IdentifyIn(t.Context(), image, 512*MiB, c.typ, "fedcba98-7654-4210-8123-456789abcdef"))
	check(t, x.IdentifyIn(t.Context(), image, 512*MiB, c.typ, c.uuid))
	command(t, "cmp", path, c.path)
	entries, err := x.ListDirIn(t.Context(), image, c.typ, "/")
	check(t, err)
	listed, err := x.ListDir(t.Context(), c.path, c.typ, "/")
	check(t, err)
	if !slices.Equal(entries, listed) || len(entries) < 100 {
		t.Errorf("as bytes %d entries, as a file %d", len(entries), len(listed))
	}
	var b bytes.Buffer
	check(t, x.ReadFileIn(t.Context(), image, c.typ, "9", &b))
	if !bytes.Equal(b.Bytes(), bytes.Repeat([]byte{9}, 10000)) {
		t.Errorf("a file as bytes: %d bytes", b.Len())
	}
	for _, err := range []error{
		x.IdentifyIn(t.Context(), image, 512*MiB, None, c.uuid), x.ReadFileIn(t.Context(), image, None, "9", &b),
	} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("without a filesystem: %v", err)
		}
	}
}

type clone struct {
	path, uuid, dir string
	typ             Type
	unmount         func()
}

func (c *clone) use(t *testing.T, x Tools) {
	t.Helper()
	if have := string(bytes.TrimSpace(command(t, "blkid", "-p", "-o", "value", "-s", "UUID", c.path))); have != c.uuid {
		t.Errorf("blkid says %s", have)
	}
	writeFile(t, filepath.Join(c.dir, "more"), bytes.Repeat([]byte("x"), 1<<20))
	command(t, "sync", filepath.Join(c.dir, "more"))
	// btrfs uses its log, and is dirty, only from the second flush of a file on.
	writeFile(t, filepath.Join(c.dir, "more"), bytes.Repeat([]byte("x"), 1<<20))
	command(t, "sync", filepath.Join(c.dir, "more"))
	cut := copyImage(t, c.path)
	c.unmount()
	check(t, x.Check(t.Context(), c.path, c.typ, false))
	if dirty, err := x.Dirty(t.Context(), c.path, c.typ); err != nil || dirty {
		t.Errorf("unmounted cleanly, dirty is %v: %v", dirty, err)
	}
	if dirty, err := x.Dirty(t.Context(), cut, c.typ); err != nil || !dirty {
		t.Errorf("cut while mounted, dirty is %v: %v", dirty, err)
	}
	if err := x.Identify(t.Context(), cut, c.typ, "01234567-0000-4000-8000-23456789abcd"); !errors.Is(err, ErrDirty) {
		t.Errorf("identify of a dirty filesystem: %v", err)
	}
	if _, err := x.ListDir(t.Context(), cut, c.typ, "/"); !errors.Is(err, ErrDirty) {
		t.Errorf("list of a dirty filesystem: %v", err)
	}
	if err := x.Check(t.Context(), cut, c.typ, false); c.typ != Btrfs && !errors.Is(err, ErrDirty) {
		t.Errorf("check of a dirty filesystem: %v", err)
	}
	dir, unmount := mounted(t, cut, c.typ)
	for name, want := range map[string][]byte{"9": bytes.Repeat([]byte{9}, 10000), "more": bytes.Repeat([]byte("x"), 1<<20)} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		check(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("%s changed", name)
		}
	}
	unmount()
	check(t, x.Check(t.Context(), cut, c.typ, false))
}

// TestFreezeHoldsWrites copies an image while it is frozen: the copy needs no
// recovery of files, and writes go on after the thaw.
func TestFreezeHoldsWrites(t *testing.T) {
	for _, typ := range []Type{Ext4, XFS, Btrfs} {
		t.Run(string(typ), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			x := NewTools()
			path := blank(t, 512*MiB)
			check(t, x.Make(t.Context(), path, typ, MakeOptions{}))
			dir, unmount := mounted(t, path, typ)
			writeFile(t, filepath.Join(dir, "before"), []byte("before"))
			check(t, x.Freeze(dir))
			t.Cleanup(func() { _ = x.Thaw(dir) })
			if err := x.Freeze(dir); !errors.Is(err, ErrFrozen) {
				t.Errorf("frozen twice: %v", err)
			}
			cut := copyImage(t, path)
			check(t, x.Thaw(dir))
			check(t, x.Thaw(dir))
			writeFile(t, filepath.Join(dir, "after"), []byte("after"))
			unmount()
			d, _ := mounted(t, cut, typ)
			if got, err := os.ReadFile(filepath.Join(d, "before")); err != nil || string(got) != "before" {
				t.Errorf("in the copy: %q, %v", got, err)
			}
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

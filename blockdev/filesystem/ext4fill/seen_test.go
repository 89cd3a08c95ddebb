package ext4fill_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/blockdev/tree"
)

// seen is a file as it is shown.
type seen struct {
	Kind       fs.FileMode
	Mode       uint32
	UID, GID   uint32
	Size       int64
	ModTime    time.Time
	Target     string
	Sum        string
	Links      int
	Inode      string // the first of its names
	Xattrs     string
	Accessed   time.Time
	Changed    time.Time
	HoleBlocks int64 // 4 KiB blocks of data, of a file
}

// show reads what the kernel shows of an image mounted read-only.
func show(t tb, image string) map[string]seen {
	t.Helper()
	dir, err := os.MkdirTemp(filepath.Dir(image), "mount")
	check(t, err)
	defer os.Remove(dir)
	command(t, "mount", "-o", "loop,ro,noatime", image, dir)
	defer command(t, "umount", dir)
	got := map[string]seen{}
	first := map[uint64]string{}
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		got[name] = look(t, path, name, first)
		return nil
	}))
	return got
}

func look(t tb, path, name string, first map[uint64]string) seen {
	t.Helper()
	info, err := os.Lstat(path)
	check(t, err)
	st := info.Sys().(*syscall.Stat_t)
	if _, ok := first[st.Ino]; !ok {
		first[st.Ino] = name
	}
	s := seen{
		Kind: info.Mode().Type(), Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Size: st.Size, ModTime: info.ModTime().UTC(),
		Accessed: time.Unix(st.Atim.Unix()).UTC(), Changed: time.Unix(st.Ctim.Unix()).UTC(), Links: int(st.Nlink), Inode: first[st.Ino],
	}
	switch s.Kind {
	case fs.ModeDir:
		s.Size = 0
	case fs.ModeSymlink:
		s.Target, err = os.Readlink(path)
		check(t, err)
	default:
		s.Sum, s.HoleBlocks = readSparse(t, path, st.Size)
	}
	s.Xattrs = xattrs(t, path)
	return s
}

func readSparse(t tb, path string, size int64) (string, int64) {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	h, at, blocks := sha256.New(), int64(0), int64(0)
	skip := func(to int64) {
		for at < to {
			k := min(to-at, MiB)
			h.Write(zeroes[:k])
			at += k
		}
	}
	for at < size {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err != nil {
			break
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		check(t, err)
		skip(start)
		_, err = io.Copy(h, io.NewSectionReader(f, start, end-start))
		check(t, err)
		at = end
		blocks += (end - start + tree.Block - 1) / tree.Block
	}
	skip(size)
	return hex.EncodeToString(h.Sum(nil)), blocks
}

// list and value are room for xattrs; tests here do not run in parallel.
var list, value = make([]byte, 65536), make([]byte, 65536)

func xattrs(t tb, path string) string {
	t.Helper()
	n, err := unix.Llistxattr(path, list)
	check(t, err)
	var names []string
	for name := range bytes.SplitSeq(list[:n], []byte{0}) {
		if len(name) > 0 {
			names = append(names, string(name))
		}
	}
	slices.Sort(names)
	var out strings.Builder
	for _, name := range names {
		n, err := unix.Lgetxattr(path, name, value)
		check(t, err)
		fmt.Fprintf(&out, "%s=%x ", name, value[:n])
	}
	return out.String()
}

// same compares what is seen with what must be.
func same(t tb, got, want map[string]seen) {
	t.Helper()
	if _, ok := want["lost+found"]; !ok {
		if got["lost+found"].Kind != fs.ModeDir {
			t.Errorf("lost+found is %+v", got["lost+found"])
		}
		delete(got, "lost+found")
	}
	bad := 0
	for name, w := range want {
		if g := got[name]; g != w && bad < 10 {
			bad++
			t.Errorf("%q:\nhave %+v\nwant %+v", name, g, w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d names, want %d", len(got), len(want))
	}
}

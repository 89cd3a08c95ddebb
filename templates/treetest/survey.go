package treetest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix" //nolint:depguard // this package exists for tests
)

// Inode is all that a template has to keep of a file.
type Inode struct {
	Mode   string // octal, with the type
	UID    uint32
	GID    uint32
	MTime  time.Time
	Size   int64
	Rdev   uint64
	Text   string // of a link; digest of a file
	Xattrs string // and ACLs
	Names  uint64 // how many names it has, inside the tree and outside
	Peers  string // the names that it has in the tree
	Sparse bool   // it occupies less than half of its size
}

// Survey reads a tree, without ext4's lost+found.
func Survey(t testing.TB, root string) map[string]Inode {
	t.Helper()
	tree, err := survey(root)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func survey(root string) (map[string]Inode, error) {
	tree := map[string]Inode{}
	peers := map[uint64][]string{}
	numbers := map[string]uint64{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if rel == "lost+found" {
			return fs.SkipDir
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		n := Inode{
			Mode: fmt.Sprintf("%06o", st.Mode), UID: st.Uid, GID: st.Gid, Rdev: st.Rdev,
			MTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec).UTC(),
		}
		if n.Xattrs, err = xattrs(path); err != nil {
			return err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			n.Text, err = os.Readlink(path)
		case unix.S_IFREG:
			n.Size, n.Sparse = st.Size, st.Blocks*512 < st.Size/2
			n.Text, err = digest(path, st.Size)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR { // btrfs counts no directory's names
			n.Names = st.Nlink
			peers[st.Ino] = append(peers[st.Ino], rel)
			numbers[rel] = st.Ino
		}
		tree[rel] = n
		return err
	})
	for rel, n := range tree {
		all := peers[numbers[rel]]
		slices.Sort(all)
		n.Peers = strings.Join(all, "\x00")
		tree[rel] = n
	}
	return tree, err
}

// digest is of what is not zero and where it is, by 4 KiB, so that filesystems
// with other blocks compare.
func digest(path string, size int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole to the end
		}
		if err != nil {
			return "", err
		}
		at = data &^ 4095
		n, err := f.ReadAt(buf[:min(int64(len(buf)), size-at)], at)
		if err != nil {
			return "", err
		}
		for block := range slices.Chunk(buf[:n], 4096) {
			if bytes.Count(block, []byte{0}) != len(block) {
				h.Write(block)
				fmt.Fprintf(h, "@%d", at)
			}
			at += int64(len(block))
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(path string) (string, error) {
	buf := make([]byte, 65536)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return "", err
	}
	var list []string
	for _, name := range strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.SGI_ACL_") { // how XFS shows ACLs once more
			continue
		}
		value := make([]byte, 65536)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", err
		}
		list = append(list, fmt.Sprintf("%s=%q", name, value[:n]))
	}
	slices.Sort(list)
	return strings.Join(list, " "), nil
}

// mostReported bounds what is said about one comparison.
const mostReported = 20

// Compare fails the test for each inode that is not what it was, or should not be
// there. More holes than before are welcome.
func Compare(t testing.TB, want, have map[string]Inode) {
	t.Helper()
	wrong := 0
	report := func(format string, args ...any) {
		t.Helper()
		if wrong++; wrong <= mostReported {
			t.Errorf(format, args...)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(want)) {
		w, h := want[path], have[path]
		if _, ok := have[path]; !ok {
			report("%q is missing", path)
			continue
		}
		h.Sparse = h.Sparse && w.Sparse
		if w != h {
			report("%q\n want %+v\n have %+v", path, w, h)
		}
	}
	for path := range have {
		if _, ok := want[path]; !ok {
			report("%q should not be there", path)
		}
	}
	if wrong > mostReported {
		t.Errorf("and %d more", wrong-mostReported)
	}
}

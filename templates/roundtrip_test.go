package templates_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/tarball"
	"holdfast/templates"
)

// inode is all that a template has to keep of a file.
type inode struct {
	mode   string
	uid    uint32
	gid    uint32
	mtime  time.Time
	size   int64
	rdev   uint64
	text   string // of a link; digest of a file
	xattrs string
	peers  string // paths of the same inode
	holes  string // ranges of data
}

// survey reads a tree, without ext4's lost+found.
func survey(t *testing.T, root string) map[string]inode {
	t.Helper()
	tree := map[string]inode{}
	peers := map[uint64][]string{}
	numbers := map[string]uint64{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
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
		n := inode{
			mode: fmt.Sprintf("%06o", st.Mode), uid: st.Uid, gid: st.Gid, rdev: st.Rdev,
			mtime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec).UTC(), xattrs: xattrs(t, path),
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			n.text, err = os.Readlink(path)
		case unix.S_IFREG:
			n.size = st.Size
			n.text, n.holes = digest(t, path, st.Size)
			peers[st.Ino] = append(peers[st.Ino], rel)
			numbers[rel] = st.Ino
		}
		tree[rel] = n
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for rel, n := range tree {
		all := peers[numbers[rel]]
		sort.Strings(all)
		n.peers = strings.Join(all, "\x00")
		tree[rel] = n
	}
	return tree
}

func digest(t *testing.T, path string, size int64) (sum, holes string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	buf := make([]byte, 4096)
	for at := int64(0); at < size; { // holes by 4 KiB, so that filesystems with other blocks compare
		n, err := f.ReadAt(buf[:min(4096, size-at)], at)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Count(buf[:n], []byte{0}) != n {
			h.Write(buf[:n])
			fmt.Fprintf(h, "@%d", at)
		}
		at += int64(n)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 < size/2 {
		holes = "sparse"
	}
	return hex.EncodeToString(h.Sum(nil)), holes
}

func xattrs(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 65536)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, name := range strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.SGI_ACL_") { // how XFS shows ACLs once more
			continue
		}
		value := make([]byte, 65536)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("%s=%q", name, value[:n]))
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

func compare(t *testing.T, want, have map[string]inode) {
	t.Helper()
	for _, path := range slices.Sorted(maps.Keys(want)) {
		w := want[path]
		h, ok := have[path]
		switch {
		case !ok:
			t.Errorf("%q is missing", path)
		case w.holes == "" && h.holes != "":
			h.holes = "" // more holes than before are welcome
			fallthrough
		case w != h:
			if w != h {
				t.Errorf("%q\n want %+v\n have %+v", path, w, h)
			}
		}
	}
	for path := range have {
		if _, ok := want[path]; !ok {
			t.Errorf("%q should not be there", path)
		}
	}
}

// plant makes a tree with everything that a template keeps.
func plant(t *testing.T, root string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p := func(name string) string { return root + "/" + name }
	write := func(name, body string, mode os.FileMode) {
		must(os.WriteFile(p(name), []byte(body), 0o600))
		must(os.Chmod(p(name), mode))
	}
	for _, dir := range []string{"empty", "bin", "deep/a/b/c/d/e/f/g", "sticky", "café-日本語-🚀", "-rf", "unreadable"} {
		must(os.MkdirAll(p(dir), 0o755))
	}
	must(os.Chmod(p("sticky"), 0o777|os.ModeSticky))
	must(os.Chmod(p("unreadable"), 0))
	write("plain.txt", "hello\n", 0o644)
	write("zero", "", 0o600)
	write("bin/su", "#!setuid", 0o755|os.ModeSetuid)
	write("bin/wall", "#!setgid", 0o755|os.ModeSetgid)
	write("mode000", "secret", 0)
	write("-rf/--help", "leading dashes", 0o640)
	write("café-日本語-🚀/naïve name with  spaces ", "unicode", 0o644)
	write("raw-\xff\xfe-bytes", "not UTF-8", 0o644)
	write("new\nline\ttab\\back\"quote*?", "odd", 0o644)
	write(strings.Repeat("n", 255), "a name of 255 bytes", 0o644)
	write(".hidden", "x", 0o444)
	long := p(strings.Repeat("l", 200)) + "/" + strings.Repeat("m", 200) + "/" + strings.Repeat("n", 200)
	must(os.MkdirAll(long, 0o711))
	must(os.WriteFile(long+"/deep", []byte("long path"), 0o644))
	must(os.WriteFile(p("big"), bytes.Repeat([]byte("0123456789abcdef"), 200_000), 0o644))
	must(os.Link(p("plain.txt"), p("hard1")))
	must(os.Link(p("plain.txt"), p("deep/hard2")))
	must(os.Link(p("zero"), p("zero2")))
	for name, text := range map[string]string{
		"rel": "plain.txt", "abs": "/etc/passwd", "up": "../../../../etc/shadow", "dangling": "nowhere", "loop": "loop",
		"todir": "deep/a", "long": strings.Repeat("x/", 500),
	} {
		must(os.Symlink(text, p("link-"+name)))
	}
	sparse, err := os.Create(p("sparse"))
	must(err)
	_, err = sparse.WriteAt([]byte("island"), 40<<20)
	must(err)
	_, err = sparse.WriteAt(bytes.Repeat([]byte{7}, 10000), 80<<20+5)
	must(err)
	must(sparse.Truncate(128 << 20))
	must(sparse.Close())
	must(unix.Lsetxattr(p("plain.txt"), "user.color", []byte("blue\x00\xff"), 0))
	must(unix.Lsetxattr(p("bin"), "user.dir", []byte(strings.Repeat("v", 1000)), 0))
	must(unix.Lsetxattr(p("bin"), "trusted.overlay.opaque", []byte("y"), 0))
	must(unix.Lsetxattr(p("link-rel"), "trusted.link", []byte("on a link"), 0))
	// cap_net_raw=ep, VFS_CAP_REVISION_2
	must(unix.Lsetxattr(p("bin/wall"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	acl := "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x07\x00\xe8\x03\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"
	must(unix.Lsetxattr(p("-rf/--help"), "system.posix_acl_access", []byte(acl), 0))
	must(unix.Lsetxattr(p("sticky"), "system.posix_acl_default", []byte(acl), 0))
	for i := range 400 {
		must(os.WriteFile(p(fmt.Sprintf("deep/a/file-%04d", i)), []byte(strings.Repeat("y", i*13)), 0o644))
	}
	must(os.Lchown(p("plain.txt"), 1000, 1001))
	must(os.Lchown(p("empty"), 4294967294, 65534))
	must(os.Lchown(p("link-rel"), 33, 33))
	i := int64(0)
	must(filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		i++
		at := unix.NsecToTimespec(1_500_000_000_000_000_000 + i*1_000_000_007)
		if strings.HasSuffix(path, "/zero") {
			at = unix.Timespec{Sec: -86400, Nsec: 999999999} // before 1970
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// tarred packs a tree as GNU tar does.
func tarred(t *testing.T, root string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("tar", append(append([]string{"-C", root}, args...), "-cf", "-", ".")...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4, blockdevtest.Btrfs)
	r := reflinkRig(t, 6<<30, nil)
	root := t.TempDir()
	if err := syscall.Chmod(root, 0o1751); err != nil {
		t.Fatal(err)
	}
	plant(t, root)
	want := survey(t, root)
	archive := tarred(t, root, "--format=pax", "--sparse", "--xattrs", "--xattrs-include=*")
	r.put("tree")
	v := r.push("tree", archive)
	if v.Status != templates.Ready || v.Number != 1 || v.Name != "1" {
		t.Errorf("revision %+v", v)
	}
	if held := r.space.reserved(); held != 0 {
		t.Errorf("%d bytes are still set aside", held)
	}
	for _, spec := range []templates.SourceSpec{
		{Filesystem: filesystem.Ext4, Size: v.MinimumBytes},
		{Filesystem: filesystem.Ext4, Size: 1 << 30},
		{Filesystem: filesystem.XFS, Size: v.MinimumFor(filesystem.XFS)},
		{Filesystem: filesystem.Btrfs, Size: v.MinimumFor(filesystem.Btrfs)},
	} {
		spec.Revision = v.ID
		t.Run(fmt.Sprintf("%s %d", spec.Filesystem, spec.Size), func(t *testing.T) {
			at := *r
			at.t = t
			compare(t, want, survey(t, at.mounted(spec)))
		})
	}
}

// Archives of other tools: what their format can say arrives.
func TestFlavours(t *testing.T) {
	r := reflinkRig(t, 2<<30, nil)
	root := t.TempDir()
	plant(t, root)
	// What only PAX can say, and names longer than ustar takes.
	for _, name := range []string{"link-long", strings.Repeat("l", 200), strings.Repeat("n", 255), "empty"} {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	want := survey(t, root)
	r.put("tree")
	for name, c := range map[string]struct {
		archive []byte
		differs func(string, *inode) // what the format loses
	}{
		"GNU": {tarred(t, root, "--format=gnu", "--sparse"), func(_ string, n *inode) {
			n.mtime, n.xattrs = n.mtime.Truncate(time.Second), ""
		}},
		"ustar": {tarred(t, root, "--format=ustar", "--sort=name"), func(_ string, n *inode) {
			n.xattrs = ""
			n.mtime = time.Unix(max(0, n.mtime.Unix()), 0).UTC() // before 1970 there is none
		}},
		"PAX 0.1": {tarred(t, root, "--format=pax", "--sparse", "--sparse-version=0.1", "--xattrs", "--xattrs-include=*"), func(string, *inode) {}},
		"ours":    {ours(t, root), nil},
	} {
		t.Run(name, func(t *testing.T) {
			at := *r
			at.t = t
			v := at.push("tree", c.archive)
			have := survey(t, at.mounted(templates.SourceSpec{Filesystem: filesystem.Ext4, Size: v.MinimumBytes, Revision: v.ID}))
			expected := maps.Clone(want)
			if c.differs == nil { // has no root, and leaves the host's own attributes out
				delete(expected, ".")
				delete(have, ".")
				c.differs = func(_ string, n *inode) {
					n.xattrs = trusted.ReplaceAllString(n.xattrs, "")
				}
			}
			for _, tree := range []map[string]inode{expected, have} {
				for path, n := range tree {
					c.differs(path, &n)
					tree[path] = n
				}
			}
			compare(t, expected, have)
		})
	}
}

var trusted = regexp.MustCompile(`trusted\.[a-z.]+="[^"]*" ?`)

func ours(t *testing.T, root string) []byte {
	t.Helper()
	plan, err := tarball.New(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := plan.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A template of many tiny files fits into a small volume, keeps everything in
// one of every class, and leaves a large one its space.
func TestTinyFiles(t *testing.T) {
	r := reflinkRig(t, 4<<30, nil)
	root := t.TempDir()
	for i := range 5000 {
		dir := fmt.Sprintf("%s/%02d", root, i/100)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(fmt.Sprintf("%s/f%d", dir, i), []byte(strings.Repeat("z", i%300)), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	want := survey(t, root)
	r.put("tiny")
	v := r.push("tiny", tarred(t, root, "--format=pax"))
	if v.MinimumBytes >= 12*mib || v.ImageBytes < 20*mib {
		t.Fatalf("this is about another case: %+v", v)
	}
	for _, size := range []int64{v.MinimumBytes, 15 * mib, 16 * mib, v.ImageBytes - mib, v.ImageBytes, 2 * v.ImageBytes, 1 << 30} {
		t.Run(fmt.Sprint(size/mib), func(t *testing.T) {
			at := *r
			at.t = t
			dir := at.mounted(templates.SourceSpec{Filesystem: filesystem.Ext4, Size: size, Revision: v.ID})
			compare(t, want, survey(t, dir))
			var fs unix.Statfs_t
			if err := unix.Statfs(dir, &fs); err != nil {
				t.Fatal(err)
			}
			if used := size - int64(fs.Bfree)*fs.Bsize; size == 1<<30 && used > 20*mib+size/25 {
				t.Errorf("of 1 GiB, %d MiB are used", used/mib)
			}
		})
	}
}

package treetest

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec" //nolint:depguard // this package exists for tests
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix" //nolint:depguard // this package exists for tests
)

// Plant makes a tree with everything that a template keeps.
func Plant(t testing.TB, root string) {
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

// GNUTar packs a tree as GNU tar does.
func GNUTar(t testing.TB, root string, args ...string) []byte {
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

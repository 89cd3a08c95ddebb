package main_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/api/client"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/blockdev/blockdevtest"
	"holdfast/templates/archivetest"
	"holdfast/templates/treetest"
)

// goldenTree plants everything that templates are made of in practice, and
// everything that is hard to keep.
func goldenTree(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "golden")
	for _, dir := range []string{"odd", "names", "modes", "small", "venv", "git", "deep"} {
		must(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	treetest.Plant(t, filepath.Join(root, "odd"))
	treetest.Names(t, filepath.Join(root, "names"))
	treetest.Modes(t, filepath.Join(root, "modes"))
	treetest.Small(t, filepath.Join(root, "small"), 5000)
	treetest.Environment(t, filepath.Join(root, "venv"))
	treetest.Repository(t, filepath.Join(root, "git"))
	treetest.Deep(t, filepath.Join(root, "deep"), 40)
	treetest.Sparse(t, filepath.Join(root, "sparse"), 512<<20)
	out, err := exec.Command("cp", "--archive", pnpmTree(t), filepath.Join(root, "pnpm")).CombinedOutput()
	if err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	return root
}

const pnpmVersion = "10.34.8"

// pnpmTree is a directory with node_modules as pnpm makes them: hard links into
// its store, which is beside them, and symbolic links. It stays in .cache, under
// the digest of what it is made from.
func pnpmTree(t *testing.T) string {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.NPM)
	files := []string{"package.json", "pnpm-lock.yaml"}
	sum := sha256.New()
	sum.Write([]byte(pnpmVersion))
	for _, name := range files {
		b, err := os.ReadFile(filepath.Join("testdata", "pnpm", name))
		must(t, err)
		sum.Write(b)
	}
	cache, err := filepath.Abs("../../.cache/golden")
	must(t, err)
	dir := filepath.Join(cache, "pnpm-"+hex.EncodeToString(sum.Sum(nil)[:8]))
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	must(t, os.MkdirAll(cache, 0o755))
	fresh, err := os.MkdirTemp(cache, "fresh-")
	must(t, err)
	defer os.RemoveAll(fresh)
	tool, app := filepath.Join(fresh, "tool"), filepath.Join(fresh, "app")
	must(t, errors.Join(os.Mkdir(tool, 0o755), os.Mkdir(app, 0o755)))
	for _, name := range files {
		b, err := os.ReadFile(filepath.Join("testdata", "pnpm", name))
		must(t, errors.Join(err, os.WriteFile(filepath.Join(app, name), b, 0o644)))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", tool, "pnpm@" + pnpmVersion},
		{"node", filepath.Join(tool, "node_modules", "pnpm", "bin", "pnpm.cjs"), "install", "--frozen-lockfile", "--ignore-scripts",
			"--package-import-method", "hardlink", "--store-dir", filepath.Join(app, ".store")},
	} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = app
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v (waive with %s=%s)\n%s", args, err, blockdevtest.SkipVariable, blockdevtest.NPM, out)
		}
	}
	if err := os.Rename(app, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	return dir
}

// hostsOwn are attributes that the command line leaves out: they are the host's.
var hostsOwn = regexp.MustCompile(`trusted\.[a-z.]+="[^"]*" ?`)

// A tree of all kinds, pushed by the command line and as archives of other
// tools, is seen inside volumes of every filesystem as it was, inode by inode.
func TestGoldenTrees(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Btrfs, blockdevtest.Runc)
	c := runctest.Start(t, runctest.Options{})
	u := newUploader(t, "--pool-size", "8GiB", "--max-archive", "4GiB", "--runc-roots", c.Root)
	u.template = "golden"
	root := goldenTree(t)
	want := treetest.Survey(t, root)
	if len(want) < 12_000 {
		t.Fatalf("only %d inodes", len(want))
	}
	t.Logf("%d names", len(want))

	code, out := command(t, holdfast, "--socket", filepath.Join(u.state, "holdfastd.sock"), "--workspace", "main", "template", "push", "golden", root, "--quiet")
	if code != 0 {
		t.Fatalf("push: %d %s", code, out)
	}
	pax := treetest.GNUTar(t, root, "--format=pax", "--sparse", "--xattrs", "--xattrs-include=*")
	if status, word, message := u.put(u.begin(), 0, nil); status != 400 {
		t.Fatalf("nothing: %d %s %s", status, word, message)
	}
	u.upload(t, archivetest.Zstd(pax))

	ours := maps.Clone(want)
	for path, n := range ours {
		n.Xattrs = strings.TrimSpace(hostsOwn.ReplaceAllString(n.Xattrs, ""))
		ours[path] = n
	}
	delete(ours, ".") // the command line sends what is in a directory
	for _, v := range []struct {
		template, filesystem string
		sandbox              bool
		want                 map[string]treetest.Inode
	}{
		{"golden:1", "ext4", true, ours}, {"golden:1", "xfs", false, ours}, {"golden:1", "btrfs", false, ours},
		{"golden:latest", "ext4", true, want},
	} {
		t.Run(v.template+" "+v.filesystem, func(t *testing.T) {
			name := strings.ReplaceAll(v.template, ":", "-") + "-" + v.filesystem
			u.create(name, client.VolumeSpec{Template: v.template, Size: 512, Filesystem: v.filesystem})
			have := u.seen(t, c, name, v.sandbox)
			if v.want["."].Mode == "" {
				delete(have, ".")
			}
			treetest.Compare(t, v.want, have)
		})
	}
}

// seen surveys a volume: in a sandbox as its processes see it, or mounted.
func (u *uploader) seen(t *testing.T, c *runctest.Container, volume string, sandbox bool) map[string]treetest.Inode {
	t.Helper()
	at := filepath.Join(u.state, "attach", volume)
	want := client.Attachment{Holder: "sandbox:golden", ReadOnly: true, Target: client.Target{Type: "host", Path: at}}
	if sandbox {
		at = fmt.Sprintf("/proc/%d/root/%s", c.Pid, volume)
		want.MountPath, want.Target = "/"+volume, client.Target{Type: "runc", Container: c.ID, Root: c.Root}
	}
	a, err := u.Attach(t.Context(), volume, want)
	must(t, err)
	have := treetest.Survey(t, at)
	_, err = u.Detach(t.Context(), volume, a.ID)
	must(t, err)
	return have
}

// upload sends an archive; it must become a version.
func (u *uploader) upload(t *testing.T, b []byte) {
	t.Helper()
	if status, word, message := u.put(u.begin(), int64(len(b)), bytes.NewReader(b)); status != 200 {
		t.Fatalf("%d %s: %s", status, word, message)
	}
}

// Archives of other writers: what their format can say arrives.
func TestWriters(t *testing.T) {
	u := newUploader(t)
	u.template = "writers"
	root := filepath.Join(t.TempDir(), "tree")
	must(t, os.Mkdir(root, 0o755))
	treetest.Names(t, root)
	treetest.Deep(t, root, 40)
	treetest.Repository(t, filepath.Join(root, "git"))
	treetest.Sparse(t, filepath.Join(root, "sparse"), 64<<20)
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		at := unix.NsecToTimespec(1_600_000_000_500_000_000) // what a floating-point number can say, which Python writes
		return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW))
	}))
	want := treetest.Survey(t, root)
	python := "import tarfile,sys; t=tarfile.open(fileobj=sys.stdout.buffer,mode='w|gz',format=tarfile.PAX_FORMAT); t.add('.')\nt.close()"
	for _, w := range []struct {
		name string
		args []string
		same func(*treetest.Inode) // what the format loses
	}{
		{"GNU tar", []string{"tar", "--format=gnu", "--sparse", "-cf", "-", "."}, func(n *treetest.Inode) { n.MTime = n.MTime.Truncate(time.Second) }},
		{"bsdtar pax", []string{"bsdtar", "--format=pax", "-cf", "-", "."}, func(*treetest.Inode) {}},
		{"bsdtar zip", []string{"bsdtar", "--format=zip", "-cf", "-", "."}, func(n *treetest.Inode) { n.MTime = n.MTime.Truncate(time.Second); n.Names, n.Peers = 1, "" }},
		{"python", []string{"python3", "-c", python}, func(n *treetest.Inode) {
			if strings.HasPrefix(n.Mode, "12") {
				n.Names, n.Peers = 1, "" // it makes several symbolic links of one
			}
		}},
		// It takes a file whose name is a dash for its input, and stores no symbolic link
		// into a pipe; bsdtar's has them.
		{"zip", []string{"sh", "-c", "cd git && zip -qry - . -x clone/tool | cat"}, func(n *treetest.Inode) { n.MTime = n.MTime.Truncate(time.Second); n.Names, n.Peers = 1, "" }},
		{"bsdtar zstd", []string{"bsdtar", "--format=pax", "--zstd", "-cf", "-", "."}, func(*treetest.Inode) {}},
		{"bsdtar gzip", []string{"bsdtar", "--format=gnutar", "-czf", "-", "."}, func(n *treetest.Inode) { n.MTime = n.MTime.Truncate(time.Second) }},
		{"zstd", []string{"tar", "--format=pax", "--sparse", "--zstd", "-cf", "-", "."}, func(*treetest.Inode) {}},
	} {
		t.Run(w.name, func(t *testing.T) {
			cmd := exec.Command(w.args[0], w.args[1:]...)
			cmd.Dir = root
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			b, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v: %s", err, &stderr)
			}
			u.upload(t, b)
			name := strings.ReplaceAll(strings.ToLower(w.name), " ", "-")
			u.create(name, client.VolumeSpec{Template: "writers:latest", Size: 128})
			have := u.seen(t, nil, name, false)
			_, err = u.DeleteVolume(t.Context(), name)
			must(t, err)
			trees := []map[string]treetest.Inode{maps.Clone(want), have}
			if w.name == "zip" {
				trees[0] = treetest.Survey(t, filepath.Join(root, "git"))
				delete(trees[0], "clone/tool")
			}
			for _, tree := range trees {
				delete(tree, ".") // a zip has none
				for path, n := range tree {
					w.same(&n)
					tree[path] = n
				}
			}
			treetest.Compare(t, trees[0], trees[1])
		})
	}
}

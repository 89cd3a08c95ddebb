package blockdevtest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"holdfast/internal/run"
)

// DirOption changes what ReflinkDir, BtrfsDir and Ext4Dir make.
type DirOption func(*dirOptions)

type dirOptions struct{ size int64 }

// Size sets the size of the filesystem in bytes. XFS refuses less than 300 MiB.
func Size(bytes int64) DirOption { return func(o *dirOptions) { o.size = bytes } }

// ReflinkDir gives a directory that is the root of an XFS filesystem with
// reflink, 512 MiB unless Size says otherwise, in a sparse file. It is unmounted
// when the test ends.
func ReflinkDir(t testing.TB, opts ...DirOption) string {
	t.Helper()
	Require(t, ReflinkPool)
	return mountedImage(t, 512<<20, opts, "mkfs.xfs", "-q", "-m", "reflink=1,rmapbt=1")
}

// BtrfsDir gives a directory that is the root of a btrfs filesystem, 256 MiB unless
// Size says otherwise. It is unmounted when the test ends.
func BtrfsDir(t testing.TB, opts ...DirOption) string {
	t.Helper()
	Require(t, Root, Loop, Btrfs)
	return mountedImage(t, 256<<20, opts, "mkfs.btrfs", "-q", "-m", "single")
}

// Ext4Dir gives a directory that is the root of an ext4 filesystem (which has
// no reflink), 64 MiB unless Size says otherwise. It is unmounted when the test
// ends.
func Ext4Dir(t testing.TB, opts ...DirOption) string {
	t.Helper()
	Require(t, Root, Loop, Ext4)
	return mountedImage(t, 64<<20, opts, "mkfs.ext4", "-q", "-m", "0", "-b", "4096")
}

func mountedImage(t testing.TB, size int64, opts []DirOption, mkfs ...string) string {
	t.Helper()
	o := dirOptions{size: size}
	for _, opt := range opts {
		opt(&o)
	}
	base := t.TempDir()
	image, dir := filepath.Join(base, "fs.img"), filepath.Join(base, "fs")
	for _, err := range []error{os.WriteFile(image, nil, 0o600), os.Truncate(image, o.size), os.Mkdir(dir, 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(t, append(mkfs, image)...)
	must(t, "mount", "-o", "loop", image, dir) // its loop device goes away with the last unmount
	t.Cleanup(func() { must(t, "umount", dir) })
	return dir
}

// must runs a command that the test cannot do without.
func must(t testing.TB, args ...string) {
	t.Helper()
	if _, err := run.Run(context.Background(), run.Cmd{Args: args}); err != nil {
		t.Fatal(err)
	}
}

// LoopsUnder tells the loop devices ("/dev/loopN") whose backing file is below
// dir, deleted files included.
func LoopsUnder(t testing.TB, dir string) []string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var loops []string
	for _, file := range files {
		backing, err := os.ReadFile(file)
		if err == nil && below(string(backing), dir) { // an error: detached meanwhile
			loops = append(loops, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(file))))
		}
	}
	return loops
}

// openUnder tells our own descriptors of files below dir or of one of devices.
func openUnder(t testing.TB, dir string, devices []string) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, entry := range entries {
		target, err := os.Readlink("/proc/self/fd/" + entry.Name())
		if err != nil {
			continue
		}
		hit := below(target, dir)
		for _, device := range devices {
			hit = hit || target == device
		}
		if hit {
			open = append(open, entry.Name()+" "+strconv.Quote(target))
		}
	}
	return open
}

func below(path, dir string) bool {
	return len(path) > len(dir) && path[:len(dir)] == dir && path[len(dir)] == '/'
}

func leftBehind(kind string, found []string) error {
	if len(found) == 0 {
		return nil
	}
	return fmt.Errorf("left behind: %s %v", kind, found)
}

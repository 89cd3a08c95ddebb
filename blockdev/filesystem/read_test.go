package filesystem

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// found is what a reader must tell of one file.
type found struct {
	Entry
	sum [32]byte
}

// TestReadersAgreeWithTheKernel fills a filesystem with all that is hard to
// read and compares what the kernel shows with what the reader finds.
func TestReadersAgreeWithTheKernel(t *testing.T) {
	for _, c := range []struct {
		typ  Type
		size int64
	}{{Ext4, 512 * MiB}, {Ext4, 15 * MiB}, {XFS, 512 * MiB}, {Btrfs, 512 * MiB}} {
		t.Run(fmt.Sprintf("%s-%d", c.typ, c.size/MiB), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			x := NewTools()
			path := blank(t, c.size)
			check(t, x.Make(t.Context(), path, c.typ, MakeOptions{Inodes: 6000}))
			dir, unmount := mounted(t, path, c.typ)
			fillHard(t, dir, c.size > 100*MiB)
			if c.typ == Btrfs {
				command(t, "btrfs", "subvolume", "create", filepath.Join(dir, "sub"))
				writeFile(t, filepath.Join(dir, "sub", "inside"), []byte("inside"))
			}
			want := map[string]found{}
			kernelTree(t, dir, "", want)
			unmount()
			got := map[string]found{}
			readerTree(t, x, path, c.typ, "", got)
			for name, w := range want {
				if !reflect.DeepEqual(got[name], w) {
					t.Errorf("%q:\nhave %+v\nwant %+v", name, got[name].Entry, w.Entry)
				}
			}
			if len(got) != len(want) {
				t.Errorf("%d entries, want %d", len(got), len(want))
			}
			refusals(t, x, path, c.typ)
		})
	}
}

func refusals(t *testing.T, x Tools, path string, typ Type) {
	t.Helper()
	var b bytes.Buffer
	for _, name := range []string{"absent", "many", "many/absent", "plain/x", "to-passwd", "to-many/0001", "fifo", "", "..", strings.Repeat("a/", 600)} {
		if err := x.ReadFile(t.Context(), path, typ, name, &b); !errors.Is(err, ErrNoFile) {
			t.Errorf("ReadFile %q: %v", name, err)
		}
	}
	for _, name := range []string{"absent", "plain", "to-many", "many/../plain"} {
		if _, err := x.ListDir(t.Context(), path, typ, name); !errors.Is(err, ErrNoFile) {
			t.Errorf("ListDir %q: %v", name, err)
		}
	}
	if b.Len() != 0 {
		t.Errorf("refused files wrote %q", b.String())
	}
	check(t, x.ReadFile(t.Context(), path, typ, "/./many//../../plain", &b))
	if b.String() != "plain\n" {
		t.Errorf("read %q", b.String())
	}
}

func fillHard(t *testing.T, dir string, large bool) {
	t.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	writeFile(t, filepath.Join(dir, "plain"), []byte("plain\n"))
	for _, name := range []string{"new\nline", "quo\"te", "\xff\xfe", " lead", "trail ", "\\back", "-dash", "tab\tx", "übergröße", strings.Repeat("n", 255)} {
		writeFile(t, filepath.Join(dir, name), []byte(name))
	}
	check(t, os.MkdirAll(filepath.Join(dir, "a dir/deep/er"), 0o2775))
	writeFile(t, filepath.Join(dir, "a dir/deep/er/x"), []byte("deep"))
	check(t, os.Symlink("/etc/passwd", filepath.Join(dir, "to-passwd")))
	check(t, os.Symlink("many", filepath.Join(dir, "to-many")))
	for _, n := range []int{59, 60, 300, 900} {
		check(t, os.Symlink(strings.Repeat("l", n), filepath.Join(dir, fmt.Sprint("link", n))))
	}
	check(t, syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	check(t, syscall.Mknod(filepath.Join(dir, "null"), syscall.S_IFCHR|0o666, 1<<8|3))
	check(t, os.Link(filepath.Join(dir, "plain"), filepath.Join(dir, "hard")))
	check(t, os.Chown(filepath.Join(dir, "plain"), 100000, 4000000000))
	check(t, os.Chmod(filepath.Join(dir, "plain"), 0o640|fs.ModeSetuid|fs.ModeSticky))
	many := 300
	if large {
		many = 5000
	}
	check(t, os.Mkdir(filepath.Join(dir, "many"), 0o755))
	for i := range many {
		writeFile(t, filepath.Join(dir, "many", fmt.Sprintf("%04d", i)), nil)
	}
	for i := 0; i < many; i += 3 {
		check(t, os.Remove(filepath.Join(dir, "many", fmt.Sprintf("%04d", i))))
	}
	holes, err := os.Create(filepath.Join(dir, "holes"))
	check(t, err)
	block := make([]byte, 5000)
	for i := range many / 2 {
		for j := range block {
			block[j] = byte(random.Uint32())
		}
		_, err := holes.WriteAt(block, int64(i)*12288)
		check(t, err)
	}
	check(t, holes.Truncate(int64(many/2)*12288+123456))
	check(t, syscall.Fallocate(int(holes.Fd()), 1 /* keep size */, 1<<30, 8192))
	check(t, syscall.Fallocate(int(holes.Fd()), 0, int64(many/2)*12288+200000, 8192))
	check(t, holes.Close())
}

// kernelTree describes all below a mounted directory.
func kernelTree(t *testing.T, root, dir string, into map[string]found) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, dir))
	check(t, err)
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		info, err := os.Lstat(filepath.Join(root, name))
		check(t, err)
		st := info.Sys().(*syscall.Stat_t)
		w := found{Entry: Entry{Name: e.Name(), Mode: info.Mode(), UID: int(st.Uid), GID: int(st.Gid), Size: st.Size, ModTime: info.ModTime().UTC()}}
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(filepath.Join(root, name))
			check(t, err)
			w.sum = sha256.Sum256(data)
		case info.IsDir():
			kernelTree(t, root, name, into)
		case info.Mode()&fs.ModeSymlink != 0:
			w.Target, err = os.Readlink(filepath.Join(root, name))
			check(t, err)
		}
		into[name] = w
	}
}

func readerTree(t *testing.T, x Tools, path string, typ Type, dir string, into map[string]found) {
	t.Helper()
	entries, err := x.ListDir(t.Context(), path, typ, dir)
	check(t, err)
	for _, e := range entries {
		name := filepath.Join(dir, e.Name)
		got := found{Entry: e}
		if e.Mode.IsDir() {
			readerTree(t, x, path, typ, name, into)
		}
		if e.Mode.IsRegular() && (dir != "many" || e.Name < "0100") {
			sum := sha256.New()
			check(t, x.ReadFile(t.Context(), path, typ, name, sum))
			got.sum = [32]byte(sum.Sum(nil))
		} else if e.Mode.IsRegular() {
			got.sum = sha256.Sum256(nil)
		}
		into[name] = got
	}
}

package filesystem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"holdfast/blockdev/filesystem/internal/ext4disk"
)

// tamper writes bytes into an image.
func tamper(t *testing.T, path string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	check(t, err)
	defer f.Close()
	_, err = f.WriteAt(b, at)
	check(t, err)
}

// tamperSuper changes an ext4 superblock and sets its checksum right.
func tamperSuper(t *testing.T, path string, change func(b []byte)) {
	t.Helper()
	b, err := readHead(path, ext4SuperOffset, ext4SuperBytes)
	check(t, err)
	change(b)
	binary.LittleEndian.PutUint32(b[ext4disk.SuperSumAt:], ext4disk.SuperSum(b))
	tamper(t, path, ext4SuperOffset, b)
}

// tampered are images that a guest has made of an ext4, and what is said of them.
var tampered = []struct {
	name string
	do   func(t *testing.T, path string)
	want error
	text string
}{
	{"nothing", func(*testing.T, string) {}, nil, ""},
	{"boot sector without partitions", func(t *testing.T, path string) { tamper(t, path, 510, []byte{0x55, 0xAA}) }, nil, ""},
	{"partition table", func(t *testing.T, path string) {
		tamper(t, path, 446, []byte{0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0})
		tamper(t, path, 510, []byte{0x55, 0xAA})
	}, ErrForeign, "MBR"},
	{"GPT", func(t *testing.T, path string) { tamper(t, path, 512, []byte("EFI PART")) }, ErrForeign, "GPT"},
	{"qcow2 header", func(t *testing.T, path string) { tamper(t, path, 0, []byte("QFI\xfb\x00\x00\x00\x03")) }, ErrForeign, "qcow2"},
	{"zeroed superblock", func(t *testing.T, path string) { tamper(t, path, ext4SuperOffset, make([]byte, 1024)) }, ErrDamaged, "no ext4"},
	{"wrong checksum", func(t *testing.T, path string) { tamper(t, path, ext4SuperOffset+0x78, []byte("other")) }, ErrDamaged, "checksum"},
	{"larger than its device", func(t *testing.T, path string) {
		tamperSuper(t, path, func(b []byte) { binary.LittleEndian.PutUint32(b[4:], 1<<31) })
	}, ErrForeign, "on a device of"},
	{"size that overflows", func(t *testing.T, path string) {
		tamperSuper(t, path, func(b []byte) {
			binary.LittleEndian.PutUint32(b[0x18:], 6)
			binary.LittleEndian.PutUint32(b[4:], 0)
			binary.LittleEndian.PutUint32(b[0x150:], 1<<16)
		})
	}, ErrForeign, "least"},
	{"no blocks in a group", func(t *testing.T, path string) {
		tamperSuper(t, path, func(b []byte) { binary.LittleEndian.PutUint32(b[0x20:], 0) })
	}, ErrDamaged, ""},
}

func TestWhole(t *testing.T) {
	for _, c := range tampered {
		t.Run(c.name, func(t *testing.T) {
			x, path := NewTools(), blank(t, 64*MiB)
			check(t, x.Make(t.Context(), path, Ext4, MakeOptions{}))
			c.do(t, path)
			before, err := os.ReadFile(path)
			check(t, err)
			err = x.Whole(t.Context(), path, Ext4)
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v; want %v (%s)", err, c.want, c.text)
			}
			if c.want == nil {
				return
			}
			if err := x.Preen(t.Context(), path); !errors.Is(err, c.want) {
				t.Errorf("preen: %v", err)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the image was changed (%v)", err)
			}
		})
	}
	for _, typ := range []Type{XFS, Btrfs} {
		x, path := NewTools(), blank(t, 300*MiB)
		check(t, x.Make(t.Context(), path, typ, MakeOptions{}))
		check(t, x.Whole(t.Context(), path, typ))
		if err := x.Whole(t.Context(), path, Ext4); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s taken for ext4: %v", typ, err)
		}
	}
}

// TestPreen: a lost count is put right, and what loses data is its owner's.
func TestPreen(t *testing.T) {
	x, path := NewTools(), blank(t, 64*MiB)
	check(t, x.Make(t.Context(), path, Ext4, MakeOptions{}))
	check(t, x.Preen(t.Context(), path))
	tamperSuper(t, path, func(b []byte) { binary.LittleEndian.PutUint32(b[0xC:], 7) }) // free blocks
	check(t, x.Preen(t.Context(), path))
	check(t, x.Check(t.Context(), path, Ext4, false))
	check(t, os.Truncate(path, 128*MiB))
	check(t, x.Grow(t.Context(), path, Ext4))

	if out, err := exec.Command("debugfs", "-w", "-R", "clri <2>", path).CombinedOutput(); err != nil { // the root directory
		t.Fatalf("%v\n%s", err, out)
	}
	if err := x.Preen(t.Context(), path); !errors.Is(err, ErrNeedsRepair) {
		t.Errorf("without a root directory: %v", err)
	}
	if err := x.Check(t.Context(), path, Ext4, false); err == nil {
		t.Error("it was repaired behind its owner's back")
	}
}

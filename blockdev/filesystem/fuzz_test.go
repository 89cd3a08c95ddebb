package filesystem

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem/internal/ext4disk"
)

// acceptable fails the test for an error that damage must not lead to.
func acceptable(t *testing.T, err error) {
	t.Helper()
	for _, ok := range []error{ErrDamaged, ErrDirty, ErrNoFile, errors.ErrUnsupported, errEnough} {
		if errors.Is(err, ok) {
			return
		}
	}
	if err != nil {
		t.Errorf("unexpected kind of error: %v", err)
	}
}

func FuzzSuperblocks(f *testing.F) {
	for _, typ := range []Type{Ext4, XFS, Btrfs} {
		path := filepath.Join(f.TempDir(), "image")
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 300*MiB),
			NewTools().Make(f.Context(), path, typ, MakeOptions{})); err != nil {
			f.Fatal(err)
		}
		at := map[Type]int64{Ext4: ext4SuperOffset, XFS: 0, Btrfs: 64 << 10}[typ]
		b, err := readHead(path, at, 4096)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint16(0), byte(0))
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint16, c byte) {
		block := make([]byte, 4096)
		copy(block, b)
		block[at%4096] ^= c
		// A checksum keeps random bytes out: set it right, so that they come in.
		binary.LittleEndian.PutUint32(block[0x3FC:], ext4disk.SuperSum(block))
		e, err := parseExt4Super(block[:ext4SuperBytes])
		acceptable(t, err)
		if err == nil {
			_ = e.size() + e.groupOverhead(e.blocks/e.blocksPerGroup)
			_, _, _, _ = e.clean(), e.grown(1<<40), e.fills(0), e.wantsJournal(1<<30)
		}
		copy(block, b)
		block[at%4096] ^= c
		if sector := int(binary.BigEndian.Uint16(block[102:])); sector >= 512 && sector <= 4096 {
			binary.LittleEndian.PutUint32(block[xfsSuperSumAt:], xfsSum(block[:sector], xfsSuperSumAt))
		}
		x, err := parseXFSSuper(block)
		acceptable(t, err)
		if err == nil {
			log, err := x.internalLog()
			acceptable(t, err)
			if err == nil && (log.offset < 0 || log.blocks <= 0) {
				t.Errorf("log %+v", log)
			}
			_, err = newXFSReader(bytes.NewReader(block))
			acceptable(t, err)
		}
		copy(block, b)
		block[at%4096] ^= c
		binary.LittleEndian.PutUint32(block, btrfsSum(block))
		_, err = parseBtrfsSuper(block, 64<<10)
		acceptable(t, err)
	})
}

func FuzzDirectories(f *testing.F) {
	f.Add([]byte("\x02\x00\x00\x00\x0c\x00\x01\x02.\x00\x00\x00\x02\x00\x00\x00\x0c\x00\x02\x02..\x00\x00"), int64(6))
	f.Add(append([]byte{1, 0, 0, 0, 0, 128, 3, 0, 96}, "abc\x01\x00\x00\x00\x83"...), int64(17))
	f.Add(append(append([]byte("XDD3"), make([]byte, 60)...), "\x00\x00\x00\x00\x00\x00\x00\x80\x01.\x02\x00\x00\x00\x00\x40\xff\xff\x00\x08\x00\x00\x00\x50"...), int64(64))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		fn := func(name string, _ uint64) error {
			if name == "" || strings.ContainsAny(name, "/\x00") {
				t.Errorf("name %q", name)
			}
			return nil
		}
		acceptable(t, ext4DirBlock(b, fn))
		acceptable(t, xfsShortDir(b, size, fn))
		if len(b) >= 512 || len(b) > 64 && bytes.HasPrefix(b, []byte("XD")) {
			acceptable(t, xfsDirBlock(append(bytes.Clone(b), make([]byte, 8)...), fn))
		}
	})
}

var errEnough = errors.New("enough")

// patched is an image with some bytes changed.
type patched struct {
	io.ReaderAt
	bytes map[int64]byte
}

func (p patched) ReadAt(b []byte, off int64) (int, error) {
	n, err := p.ReaderAt.ReadAt(b, off)
	for at, c := range p.bytes {
		if at >= off && at < off+int64(n) {
			b[at-off] ^= c
		}
	}
	if off <= ext4SuperOffset && off+int64(n) >= ext4SuperOffset+ext4SuperBytes && len(b) == ext4SuperBytes {
		binary.LittleEndian.PutUint32(b[0x3FC:], ext4disk.SuperSum(b))
	}
	return n, err
}

// limit takes as much as no honest file of the test has.
type limit int

func (l *limit) Write(p []byte) (int, error) {
	if *l -= limit(len(p)); *l < 0 {
		return 0, errEnough
	}
	return len(p), nil
}

// readAllOf walks an image as far as it leads.
func readAllOf(t *testing.T, f io.ReaderAt, r imageReader, dir string, budget *int) {
	ctx := context.Background()
	entries, err := listDir(ctx, r, dir)
	acceptable(t, err)
	for _, e := range entries {
		if *budget--; *budget < 0 {
			return
		}
		if e.Mode.IsDir() && strings.Count(dir, "/") < 4 {
			readAllOf(t, f, r, dir+"/"+e.Name, budget)
		}
		i, err := walk(ctx, r, dir+"/"+e.Name)
		acceptable(t, err)
		if err == nil && e.Mode.IsRegular() {
			l := limit(4 * MiB)
			acceptable(t, copyFile(ctx, f, r, i, &l))
		}
	}
}

func tinyTree(t testing.TB) string {
	dir := t.TempDir()
	for name, data := range map[string]string{"a": "hello", "d/b": strings.Repeat("x", 9000), "d/e/c": ""} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 30 {
		if err := os.Symlink(strings.Repeat("t", 10*i+1), filepath.Join(dir, "d/link"+strings.Repeat("l", i))); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// FuzzExt4Image changes bytes of a real image; patch is read as pairs of a
// position and a byte.
func FuzzExt4Image(f *testing.F) {
	path := filepath.Join(f.TempDir(), "image")
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-I", "256", "-O", "^has_journal,metadata_csum", "-d", tinyTree(f), path, "1M").CombinedOutput(); err != nil {
		f.Fatalf("%v: %s", err, out)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{})
	f.Add([]byte("\x00\x04\x38\x01\x00\x20\x00\x55"))
	f.Fuzz(func(t *testing.T, patch []byte) {
		p := patched{ReaderAt: bytes.NewReader(image), bytes: map[int64]byte{}}
		for ; len(patch) >= 4 && len(p.bytes) < 32; patch = patch[4:] {
			p.bytes[(int64(patch[0])<<16|int64(patch[1])<<8|int64(patch[2]))%int64(len(image))] = patch[3]
		}
		r, err := newExt4Reader(p)
		acceptable(t, err)
		if err == nil {
			budget := 200
			readAllOf(t, p, r, "", &budget)
		}
	})
}

// imageWithTree gives a filesystem that holds tinyTree.
func imageWithTree(f *testing.F, typ Type) *os.File {
	blockdevtest.Require(f, blockdevtest.Root, blockdevtest.Loop)
	path, dir := filepath.Join(f.TempDir(), "image"), f.TempDir()
	err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 300*MiB), NewTools().Make(f.Context(), path, typ, MakeOptions{}))
	if err != nil {
		f.Fatal(err)
	}
	for _, args := range [][]string{{"mount", "-o", "loop", path, dir}, {"cp", "-a", tinyTree(f) + "/.", dir}, {"umount", dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			f.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	image, err := os.Open(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = image.Close() })
	return image
}

// FuzzXFSImage changes bytes in the first MiB, where all of the tree is, past
// the superblock.
func FuzzXFSImage(f *testing.F) {
	image := imageWithTree(f, XFS)
	f.Add([]byte{})
	f.Add([]byte("\x00\x40\x38\x01\x01\x20\x00\x55"))
	f.Fuzz(func(t *testing.T, patch []byte) {
		p := patched{ReaderAt: image, bytes: map[int64]byte{}}
		for ; len(patch) >= 4 && len(p.bytes) < 32; patch = patch[4:] {
			p.bytes[4096+(int64(patch[0])<<16|int64(patch[1])<<8|int64(patch[2]))%MiB] = patch[3]
		}
		r, err := newXFSReader(p)
		acceptable(t, err)
		if err == nil {
			budget := 200
			readAllOf(t, p, r, "", &budget)
		}
	})
}

// FuzzBtrfsImage changes bytes of the n-th node that is read, n being the first
// byte of each part of the patch, and sets its checksum right.
func FuzzBtrfsImage(f *testing.F) {
	image := imageWithTree(f, Btrfs)
	f.Add([]byte{})
	f.Add([]byte("\x03\x00\x70\x01\x05\x20\x00\x55"))
	f.Fuzz(func(t *testing.T, patch []byte) {
		p := &patchedNodes{ReaderAt: image, patch: patch, node: map[int64]byte{}}
		r, err := newBtrfsReader(p)
		acceptable(t, err)
		if err == nil {
			budget := 200
			readAllOf(t, p, r, "", &budget)
		}
	})
}

type patchedNodes struct {
	io.ReaderAt
	patch []byte
	node  map[int64]byte // by offset in the image: the how-manieth
}

func (p *patchedNodes) ReadAt(b []byte, off int64) (int, error) {
	n, err := p.ReaderAt.ReadAt(b, off)
	if len(b) != 16384 || binary.LittleEndian.Uint32(b) != btrfsSum(b) {
		return n, err
	}
	number, ok := p.node[off]
	if !ok {
		number = byte(len(p.node))
		p.node[off] = number
	}
	for c := p.patch; len(c) >= 4; c = c[4:] {
		if c[0] == number {
			b[(int(c[1])<<8|int(c[2]))%len(b)] ^= c[3]
		}
	}
	binary.LittleEndian.PutUint32(b, btrfsSum(b))
	return n, err
}

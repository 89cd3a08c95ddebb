package overlay_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// files are those of a layer; the data goes past the page cache, if flag says so.
func files(t *testing.T, name string, flag int) overlay.Files {
	t.Helper()
	var made [2]*os.File
	for i, kind := range []string{"data", "map"} {
		f, err := os.OpenFile(filepath.Join(t.TempDir(), name+"."+kind), os.O_RDWR|os.O_CREATE|flag, 0o600)
		flag = 0
		must(t, err)
		t.Cleanup(func() { must(t, f.Close()) })
		made[i] = f
	}
	return overlay.Files{Data: overlay.OSFile{File: made[0]}, Map: overlay.OSFile{File: made[1]}}
}

func allocated(t *testing.T, f overlay.File) int64 {
	t.Helper()
	s, err := sys.StatusOf(f.(overlay.OSFile).File)
	must(t, err)
	return s.Allocated
}

// TestOnFiles: a large volume over an image in files of this host, written all
// over, sealed, merged, discarded and hydrated.
func TestOnFiles(t *testing.T) {
	const size = 1 << 30
	r := rand.New(rand.NewPCG(8, 8))
	base := someBase(r, 512)
	image, err := os.Create(filepath.Join(t.TempDir(), "image"))
	must(t, err)
	defer image.Close()
	for off := int64(0); ; { // with its holes
		from, to, err := base.Next(off)
		if err != nil {
			break
		}
		_, err = image.WriteAt(base[from:to], from)
		must(t, err)
		off = to
	}
	must(t, image.Truncate(base.Size()))
	source := overlay.NewImage(image, base.Size())

	stack := []overlay.Files{files(t, "first", 0)}
	must(t, overlay.Create(stack[0], size))
	v, err := overlay.Open(stack, source)
	must(t, err)
	want := map[int64][]byte{} // by sector; what is not in it is the base's
	expect := func(v *overlay.Overlay) {
		t.Helper()
		p := make([]byte, sector)
		for at, s := range want {
			_, err := v.ReadAt(p, at*sector)
			must(t, err)
			if string(p) != string(s) {
				t.Fatalf("sector %d", at)
			}
		}
		for range 200 {
			at := r.Int64N(base.Size() / sector)
			if want[at] != nil {
				continue
			}
			_, err := v.ReadAt(p, at*sector)
			must(t, err)
			if string(p) != string(base[at*sector:(at+1)*sector]) {
				t.Fatalf("sector %d of the base", at)
			}
		}
	}
	write := func() {
		for range 300 {
			at := r.Int64N(size / sector)
			if r.IntN(2) == 0 {
				at = r.Int64N(base.Size() / sector)
			}
			want[at] = make([]byte, sector)
			fill(r, want[at])
			_, err := v.WriteAt(want[at], at*sector)
			must(t, err)
		}
	}
	write()
	next := files(t, "second", 0)
	must(t, overlay.Create(next, size))
	must(t, v.Seal(next, func() error { stack = append([]overlay.Files{next}, stack...); return nil }))
	write()
	must(t, v.Sync())
	v, err = overlay.Open(stack, source)
	must(t, err)
	expect(v)
	must(t, v.Absorb(t.Context(), 0, func() error { stack = stack[:1]; return nil }))
	expect(v)
	must(t, v.Zero(size/2, size/2, true))
	for at := range want {
		if at >= size/2/sector {
			want[at] = make([]byte, sector)
		}
	}
	if err := overlay.NewHydrator(v, nil, nil).Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	v, err = overlay.Open(stack, nil) // the base is not needed any more
	must(t, err)
	expect(v)
	if held := allocated(t, stack[0].Data); held > 8<<20 {
		t.Errorf("the volume occupies %d bytes", held)
	}
	must(t, v.Zero(0, size, true))
	if held := allocated(t, stack[0].Data); held > 1<<20 {
		t.Errorf("discarded whole it occupies %d bytes", held)
	}
}

// TestDirectFiles: what is not whole blocks is filled up with aligned ones.
func TestDirectFiles(t *testing.T) {
	base := someBase(rand.New(rand.NewPCG(4, 4)), 64)
	f := files(t, "top", syscall.O_DIRECT)
	must(t, overlay.Create(f, 1<<20))
	v, err := overlay.Open([]overlay.Files{f}, base)
	must(t, err)
	want := newModel(base, 1<<20)
	ring := directBuffer(4 * block)
	for at := int64(sector); at < 1<<19; at += 7 * sector {
		p := ring[:3*sector]
		fill(rand.New(rand.NewPCG(4, uint64(at))), p)
		if _, err := v.WriteAt(p, at); errors.Is(err, syscall.EINVAL) {
			t.Skip("direct I/O of 512 bytes: this filesystem or its disk needs more")
		} else {
			must(t, err)
		}
		want.wrote(p, at)
	}
	must(t, overlay.NewHydrator(v, nil, nil).Run(t.Context()))
	got := directBuffer(1 << 20)
	_, err = v.ReadAt(got, 0)
	must(t, err)
	if string(got) != string(want.now) {
		t.Error("it does not read as written")
	}
}

// directBuffer is aligned for direct I/O.
func directBuffer(n int) []byte {
	b := make([]byte, n+block)
	for uintptr(unsafe.Pointer(&b[0]))%block != 0 {
		b = b[1:]
	}
	return b[:n]
}

// TestFullPool: a write that finds no room is refused, and what was there stays.
func TestFullPool(t *testing.T) {
	f := files(t, "top", 0)
	must(t, overlay.Create(f, 64*block))
	full := fullFile{f.Data.(overlay.OSFile)}
	v, err := overlay.Open([]overlay.Files{{Data: full, Map: f.Map}}, nil)
	must(t, err)
	if _, err := v.WriteAt(make([]byte, block), 0); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("a write: %v", err)
	}
	must(t, v.Sync())
	if held, _ := v.Held(); held != 0 {
		t.Errorf("%d blocks are said to be held", held)
	}
}

// fullFile writes to /dev/full, which answers as a full filesystem does.
type fullFile struct{ overlay.OSFile }

func (fullFile) WriteAt(p []byte, off int64) (int, error) {
	f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return overlay.OSFile{File: f}.WriteAt(p, off)
}

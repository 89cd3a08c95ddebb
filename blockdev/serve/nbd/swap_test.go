package nbd

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
)

// layerFiles are those of an empty layer, the data past the page cache.
func layerFiles(t testing.TB, size int64) overlay.Files {
	t.Helper()
	m, err := os.Create(filepath.Join(t.TempDir(), "map"))
	must(t, err)
	t.Cleanup(func() { m.Close() })
	f := overlay.Files{Data: overlay.OSFile{File: image(t, size, syscall.O_DIRECT)}, Map: overlay.OSFile{File: m}}
	must(t, overlay.Create(f, size))
	return f
}

// TestLayers compares a volume in layers with a copy in memory.
func TestLayers(t *testing.T) {
	const size = 8 * mib
	v, err := overlay.Open([]overlay.Files{layerFiles(t, size)}, nil)
	must(t, err)
	e, err := NewExport("", v, ExportOptions{Size: size})
	must(t, err)
	_, socket := serving(t, Options{}, e)
	modelled(t, dial(t, socket).structured(""), size, 400)
}

// TestHitsAllocateNothing: what the top layer holds, and whole blocks that it is yet
// to hold, go the way of a plain file.
func TestHitsAllocateNothing(t *testing.T) {
	v, err := overlay.Open([]overlay.Files{layerFiles(t, 64*mib)}, nil)
	must(t, err)
	e, err := NewExport("", v, ExportOptions{Size: 64 * mib})
	must(t, err)
	_, socket := serving(t, Options{}, e)
	c := dial(t, socket).structured("")
	c.ok(cmdWrite, 0, 0, 8192, pattern(8192, 1))
	read, reply := requestBytes(cmdRead, 0, 1, 4096, 4096), make([]byte, dataChunkSize+4096)
	writes := make([][]byte, 400)
	for n := range writes {
		writes[n] = append(requestBytes(cmdWrite, 0, 2, 8192+uint64(n)*4096, 4096), pattern(4096, 1)...)
	}
	n := 0
	exchange := func(request, reply []byte) {
		if _, err := c.Write(request); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, reply); err != nil {
			t.Fatal(err)
		}
	}
	if got := testing.AllocsPerRun(300, func() {
		exchange(read, reply)
		exchange(writes[n], reply[:simpleSize])
		n++
	}); got != 0 {
		t.Errorf("a read and a first write allocate %v times", got)
	}
	if held, _ := v.Held(); held != int64(n)+2 {
		t.Errorf("%d blocks are held after %d writes", held, n)
	}
}

// TestSwapUnderLoad: clients that write and read all the while see one disk, though
// it is a file, then layers that change, then a file again.
func TestSwapUnderLoad(t *testing.T) {
	const size, clients, part = 16 * mib, 3, 4 * mib
	flat := image(t, size, syscall.O_DIRECT)
	e := export(t, "", flat, ExportOptions{Meter: &meter.Meter{}})
	_, socket := serving(t, Options{}, e)
	model := make([]byte, size)
	var stop atomic.Bool
	var load sync.WaitGroup
	var done atomic.Int64
	for n := range int64(clients) {
		c := dial(t, socket).structured("")
		load.Go(func() {
			r := rand.New(rand.NewPCG(uint64(n), 8))
			mine := model[n*part : (n+1)*part]
			for i := uint64(0); !stop.Load(); i++ {
				at := r.IntN(part/512) * 512
				length := min(part-at, (1+r.IntN(64))*512)
				if r.IntN(2) == 0 { // whole blocks
					at, length = at/4096*4096, 4096
				}
				switch r.IntN(4) {
				case 0:
					c.reads(uint64(n*part+int64(at)), mine[at:at+length])
				case 1:
					c.ok(cmdFlush, 0, 0, 0, nil)
				default:
					data := pattern(32<<10, i)[:length]
					c.ok(cmdWrite, uint16(r.IntN(2)), uint64(n*part+int64(at)), uint32(length), data)
					copy(mine[at:], data)
				}
				done.Add(1)
			}
		})
	}
	served := func() { at := done.Load(); await(t, func() bool { return done.Load() > at+100 }) }
	served()
	top := layerFiles(t, size)
	v, err := overlay.Open([]overlay.Files{top}, overlay.NewImage(flat, size))
	must(t, err)
	refused := errors.New("no")
	if _, err := e.Swap(v, func() error { return refused }); !errors.Is(err, refused) {
		t.Errorf("a swap that is refused: %v", err)
	}
	served()
	_, err = e.Swap(v, flat.Sync)
	must(t, err)
	served()
	next := layerFiles(t, size)
	must(t, v.Seal(next, func() error { return nil }))
	served()
	must(t, v.Absorb(t.Context(), 0, func() error { return nil }))
	must(t, overlay.NewHydrator(v, nil, nil).Run(t.Context()))
	whole, err := device.NewFile(next.Data.(overlay.OSFile).File)
	must(t, err)
	_, err = e.Swap(whole, v.Sync)
	must(t, err)
	served()
	stop.Store(true)
	load.Wait()
	got := aligned(size)
	_, err = whole.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, model) {
		t.Error("the file at the end is another disk")
	}
	if s := e.meter.Snapshot(); s.Inside != 0 || s.Kinds[meter.Write].Errors != 0 {
		t.Errorf("%d requests are inside, %d writes failed", s.Inside, s.Kinds[meter.Write].Errors)
	}
}

// blocky has blocks that nobody agreed on.
type blocky struct{ *device.File }

func (blocky) BlockSize() int { return 1 << 20 }

func TestSwapRefuses(t *testing.T) {
	f, err := device.NewFile(image(t, mib, 0))
	must(t, err)
	e := export(t, "", image(t, mib, 0), ExportOptions{})
	if _, err := e.Swap(blocky{f}, func() error { return nil }); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("larger blocks: %v", err)
	}
}

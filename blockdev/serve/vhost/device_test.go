package vhost_test

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/vhost"
	"holdfast/blockdev/serve/vhost/frontend"
)

// newLayer makes the files of an empty layer, the data's opened for direct I/O.
func newLayer(t testing.TB) overlay.Files {
	t.Helper()
	open := func(name string, flags int) overlay.File {
		f, err := os.OpenFile(filepath.Join(t.TempDir(), name), os.O_CREATE|os.O_RDWR|flags, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return overlay.OSFile{File: f}
	}
	files := overlay.Files{Data: open("data", syscall.O_DIRECT), Map: open("map", 0)}
	if err := overlay.Create(files, imageSize); err != nil {
		t.Fatal(err)
	}
	return files
}

// newOverlay makes a volume of one empty layer over an image, "" for none.
func newOverlay(t testing.TB, base string) *overlay.Overlay {
	t.Helper()
	var source overlay.Source
	if base != "" {
		f, err := os.Open(base)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		source = overlay.NewImage(f, imageSize)
	}
	v, err := overlay.Open([]overlay.Files{newLayer(t)}, source)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// An overlay lends its files, and knows what is far away.
var ()

// plain hides that a device is a file or lends some: all goes through its methods.
type plain struct{ vhost.Device }

func TestDevicesAgainstAModel(t *testing.T) {
	image := newImage(t)
	for name, d := range map[string]vhost.Device{
		"overlay":                   newOverlay(t, ""),
		"methods of an overlay":     plain{newOverlay(t, "")},
		"methods of a file":         plain{openFile(t, image, os.O_RDWR|syscall.O_DIRECT)},
		"overlay over zeroes' file": newOverlay(t, newImage(t)),
	} {
		t.Run(name, func(t *testing.T) {
			counts := &meter.Meter{}
			_, socket := serving(t, d, vhost.Options{Queues: 2, Meter: counts})
			f := connected(t, socket, frontend.Options{Queues: 2, Depth: 32, Buffer: 4 * block})
			m := newModel(t, 32)
			for _, q := range f.Queues {
				m.load(q, 1000, nil)
			}
			m.checkDevice(d)
			s, requests := counts.Snapshot(), uint64(0)
			for _, k := range s.Kinds {
				requests += k.Requests
				if k.Requests == 0 || k.Errors != 0 {
					t.Errorf("%d requests of a kind and %d errors", k.Requests, k.Errors)
				}
			}
			if requests != 2000 || s.Inside != 0 {
				t.Errorf("%d requests counted, %d are inside", requests, s.Inside)
			}
			for c, w := range s.Waits {
				if w.Now != 0 {
					t.Errorf("%d wait for %v", w.Now, meter.Cause(c))
				}
			}
		})
	}
}

// TestSwapUnderLoad: a flat image becomes the base of an overlay, and that of
// another, while a guest writes.
func TestSwapUnderLoad(t *testing.T) {
	image := newImage(t)
	s, socket := serving(t, openFile(t, image, os.O_RDWR|syscall.O_DIRECT), vhost.Options{Queues: 2})
	f := connected(t, socket, frontend.Options{Queues: 2, Depth: 32, Buffer: 4 * block})
	m := newModel(t, 32)
	v := newOverlay(t, image)
	swapped, began := make(chan struct{}), false
	m.load(f.Queues[0], 3000, func(done int) {
		if done > 1000 && !began {
			began = true
			go func() {
				defer close(swapped)
				held, err := s.Swap(v, func() error { return nil })
				t.Logf("requests waited for %v", held)
				if err != nil {
					t.Error(err)
				}
			}()
		}
	})
	<-swapped
	if held, _ := v.Held(); held == 0 {
		t.Error("nothing was written to the overlay")
	}
	refused := errors.New("not today")
	if _, err := s.Swap(openFile(t, newImage(t), os.O_RDWR), func() error { return refused }); !errors.Is(err, refused) {
		t.Error(err)
	}
	if _, err := s.Swap(openFile(t, shortImage(t), os.O_RDWR), nil); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a smaller device: %v", err)
	}
	m.load(f.Queues[1], 500, nil)
	m.checkDevice(v)
}

func shortImage(t *testing.T) string {
	t.Helper()
	image := newImage(t)
	if err := os.Truncate(image, imageSize/2); err != nil {
		t.Fatal(err)
	}
	return image
}

// unsound is a device whose flushes fail once they are told to.
type unsound struct {
	vhost.Device
	mu     sync.Mutex
	broken error
}

func (u *unsound) Sync() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return errors.Join(u.broken, u.Device.Sync())
}

func (u *unsound) turn(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.broken = err
}

// TestFailedFlushIsForEver: after a flush that failed nothing is acknowledged, also
// when the device says that all is well again, and also to the next VMM.
func TestFailedFlushIsForEver(t *testing.T) {
	u := &unsound{Device: openFile(t, newImage(t), os.O_RDWR)}
	s, socket := serving(t, u, vhost.Options{Queues: 2})
	for round := range 2 {
		f := connected(t, socket, frontend.Options{Queues: 2})
		expect := func(q *frontend.Queue, what string, want byte, put func()) {
			t.Helper()
			if status := one(t, q, put); status != want {
				t.Errorf("%s: status %d, want %d", what, status, want)
			}
		}
		q := f.Queues[0]
		if round == 0 {
			expect(q, "a flush before", 0, func() { q.Put(0, frontend.Flush, 0, 0) })
			if err := s.Failed(); err != nil {
				t.Error(err)
			}
			u.turn(syscall.EIO)
			expect(q, "the flush that fails", 1, func() { q.Put(0, frontend.Flush, 0, 0) })
			u.turn(nil)
		}
		for _, q := range f.Queues {
			expect(q, "a flush", 1, func() { q.Put(0, frontend.Flush, 0, 0) })
			expect(q, "a write", 1, func() { q.Put(0, frontend.Write, 0, block) })
			expect(q, "a discard", 1, func() { q.PutRange(0, frontend.Discard, 0, 8, 0) })
			expect(q, "zeroes", 1, func() { q.PutRange(0, frontend.WriteZeroes, 0, 8, 1) })
			expect(q, "a read", 0, func() { q.Put(0, frontend.Read, 0, block) })
		}
		f.Hangup()
	}
	if err := s.Failed(); !errors.Is(err, blockdev.ErrFailed) || !errors.Is(err, syscall.EIO) {
		t.Errorf("it failed because of %v", err)
	}
}

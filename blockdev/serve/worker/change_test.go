package worker

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

// gatedFront swaps as fronts do: it waits for requests that have begun.
type gatedFront struct {
	front
	gate    sync.RWMutex
	swapped func(shown) // once
}

func (f *gatedFront) swap(d shown, during func() error) (time.Duration, error) {
	f.gate.Lock()
	err := during()
	f.gate.Unlock()
	if do := f.swapped; do != nil {
		f.swapped = nil
		do(d)
	}
	return 0, err
}

// TestCoverWhoseLastSyncFails: the flush of a client that waits for the image below the
// new layer fails when that cannot be made durable, and nobody waits for ever.
func TestCoverWhoseLastSyncFails(t *testing.T) {
	const size = 1 << 20
	file := func(name string) *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), name))
		if err == nil {
			err = f.Truncate(size)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	flat, next := file("image"), overlay.Files{Data: overlay.OSFile{File: file("data")}, Map: overlay.OSFile{File: file("map")}}
	unsyncable, other, err := os.Pipe()
	if err == nil {
		err = overlay.Create(next, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unsyncable.Close()
	defer other.Close()
	flushed := make(chan error, 1)
	f := &gatedFront{}
	f.swapped = func(d shown) {
		begun := make(chan struct{})
		go func() {
			f.gate.RLock()
			defer f.gate.RUnlock()
			close(begun)
			flushed <- d.Sync()
		}()
		<-begun
		if err := syscall.Dup3(int(unsyncable.Fd()), int(flat.Fd()), syscall.O_CLOEXEC); err != nil {
			t.Error(err)
		}
	}
	w := &volume{flat: flat, size: size, front: f}
	covered := make(chan error, 1)
	go func() {
		_, err := w.cover(next, func() error { return nil })
		covered <- err
	}()
	for _, c := range []chan error{flushed, covered} {
		select {
		case err := <-c:
			if !errors.Is(err, blockdev.ErrFailed) {
				t.Errorf("%v, want that it has failed", err)
			}
		case <-time.After(time.Minute):
			t.Fatal("it waits for ever")
		}
	}
}

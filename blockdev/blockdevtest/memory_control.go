package blockdevtest

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"holdfast/blockdev"
)

// Restarted says what a Restart takes away. Its zero value is the death of the
// process alone: the kernel keeps files and devices.
type Restarted struct {
	LoseDrafts   bool // unpublished images are gone, as they may be after a power cut
	LoseOpenings bool // so are devices, as they are after a power cut
}

// Restart brings a crashed (or healthy) backend back, as a new process finds it.
func (m *Memory) Restart(r Restarted) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.crashed = false
	m.restarts++
	for id, image := range m.images {
		if r.LoseOpenings || image.opening != nil && image.opening.endpoint.Kind == blockdev.File {
			image.opening = nil // that of a file ends with the process
		}
		if image.opening != nil {
			image.opening.inherited = true
		}
		image.accessed = 0
		if r.LoseDrafts && image.draft {
			m.used -= image.data.release()
			delete(m.images, id)
		}
	}
}

// Restarts counts the calls of Restart.
func (m *Memory) Restarts() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.restarts
}

// SetTotal changes the capacity in bytes.
func (m *Memory) SetTotal(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total = bytes
}

// Hold keeps the open device of an image in use, so that Close answers ErrBusy,
// until release is called.
func (m *Memory) Hold(id blockdev.ID) (release func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	image := m.images[id]
	if image == nil || image.opening == nil {
		return nil, fmt.Errorf("%s is not open: %w", id, blockdev.ErrNotFound)
	}
	opening := image.opening
	opening.held++
	return sync.OnceFunc(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		opening.held--
	}), nil
}

// Counters implements blockdev.Meter: writes through MemoryImage are counted.
func (m *Memory) Counters(ctx context.Context, id blockdev.ID) (blockdev.Counters, error) {
	if err := m.begin(ctx, id); err != nil {
		return blockdev.Counters{}, blockdev.Op("memory.Counters", id, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	image := m.images[id]
	if image == nil || image.opening == nil {
		return blockdev.Counters{}, blockdev.Op("memory.Counters", id, blockdev.ErrNotFound)
	}
	return image.opening.counters, nil
}

// Exclusive implements blockdev.Accountant.
func (m *Memory) Exclusive(ctx context.Context, id blockdev.ID) (int64, error) {
	info, err := m.Stat(ctx, id)
	return info.Allocated - info.Shared, err
}

// Damage spoils the description of a published image.
func (m *Memory) Damage(id blockdev.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if image := m.images[id]; image != nil {
		image.damaged = true
	}
}

// memoryPath begins the path of every endpoint.
const memoryPath = "mem:"

// Image gives the bytes of an image by its endpoint's path ("mem:ID"), whether
// it is open or not. The handle is valid until the image is removed.
func (m *Memory) Image(path string) (*MemoryImage, error) {
	id := blockdev.ID(strings.TrimPrefix(path, memoryPath))
	m.mu.Lock()
	defer m.mu.Unlock()
	image, err := m.find(id)
	if err != nil {
		return nil, blockdev.Op("memory.Image", id, err)
	}
	return &MemoryImage{id: id, m: m, image: image}, nil
}

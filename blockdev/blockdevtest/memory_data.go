package blockdevtest

import (
	"fmt"
	"io"

	"holdfast/blockdev"
)

const memoryBlockSize = 4096

// memoryBlock is shared by all clones that have not written to it.
type memoryBlock struct {
	owners int
	bytes  [memoryBlockSize]byte
}

// memoryData is a sparse sequence of bytes.
type memoryData struct {
	size   int64
	blocks map[int64]*memoryBlock // by number; absent reads as zero
}

func (d *memoryData) clone(size int64) memoryData {
	c := memoryData{size: size, blocks: make(map[int64]*memoryBlock, len(d.blocks))}
	for n, block := range d.blocks {
		block.owners++
		c.blocks[n] = block
	}
	return c
}

// release drops all blocks and tells how many bytes nobody owns any more.
func (d *memoryData) release() (unique int64) {
	for n := range d.blocks {
		unique += d.drop(n)
	}
	return unique
}

func (d *memoryData) drop(n int64) (unique int64) {
	block := d.blocks[n]
	block.owners--
	delete(d.blocks, n)
	if block.owners == 0 {
		return memoryBlockSize
	}
	return 0
}

func (d *memoryData) space() (allocated, shared int64) {
	for _, block := range d.blocks {
		allocated += memoryBlockSize
		if block.owners > 1 {
			shared += memoryBlockSize
		}
	}
	return allocated, shared
}

// trim drops blocks of zeroes.
func (d *memoryData) trim() (freed, unique int64) {
	var zero [memoryBlockSize]byte
	for n, block := range d.blocks {
		if block.bytes == zero {
			freed += memoryBlockSize
			unique += d.drop(n)
		}
	}
	return freed, unique
}

// own gives block n for writing, and the bytes that this newly occupies.
func (d *memoryData) own(n int64) (*memoryBlock, int64) {
	if d.blocks == nil {
		d.blocks = map[int64]*memoryBlock{}
	}
	old := d.blocks[n]
	if old != nil && old.owners == 1 {
		return old, 0
	}
	block := &memoryBlock{owners: 1}
	if old != nil {
		block.bytes = old.bytes
		old.owners--
	}
	d.blocks[n] = block
	return block, memoryBlockSize
}

// MemoryImage reads and writes the bytes of an image in a Memory.
type MemoryImage struct {
	id    blockdev.ID
	m     *Memory
	image *memoryImage
}

// ID is the image's name.
func (f *MemoryImage) ID() blockdev.ID { return f.id }

// Size is the image's size in bytes.
func (f *MemoryImage) Size() int64 {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.image.data.size
}

// ReadAt implements io.ReaderAt.
func (f *MemoryImage) ReadAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	data := &f.image.data
	if off >= data.size {
		return 0, io.EOF
	}
	want := p
	p = p[:min(int64(len(p)), data.size-off)]
	clear(p)
	for done := 0; done < len(p); {
		n, within := (off+int64(done))/memoryBlockSize, (off+int64(done))%memoryBlockSize
		step := min(len(p)-done, memoryBlockSize-int(within))
		if block := data.blocks[n]; block != nil {
			copy(p[done:done+step], block.bytes[within:])
		}
		done += step
	}
	if len(p) < len(want) {
		return len(p), io.EOF
	}
	return len(p), nil
}

// WriteAt implements io.WriterAt. It fails when the image is open read-only,
// beyond its end, and with blockdev.ErrNoSpace when the pool is full.
func (f *MemoryImage) WriteAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	data := &f.image.data
	if o := f.image.opening; o != nil && o.endpoint.ReadOnly {
		return 0, fmt.Errorf("image is open read-only: %w", blockdev.ErrInvalid)
	}
	if off < 0 || off+int64(len(p)) > data.size {
		return 0, fmt.Errorf("write of %d bytes at %d of %d: %w", len(p), off, data.size, blockdev.ErrInvalid)
	}
	done := 0
	for done < len(p) {
		n, within := (off+int64(done))/memoryBlockSize, (off+int64(done))%memoryBlockSize
		if block := data.blocks[n]; f.m.used+memoryBlockSize > f.m.total && (block == nil || block.owners > 1) {
			return done, blockdev.ErrNoSpace
		}
		block, grown := data.own(n)
		f.m.used += grown
		done += copy(block.bytes[within:], p[done:])
	}
	if o := f.image.opening; o != nil {
		o.counters.Writes++
		o.counters.WriteBytes += int64(done)
	}
	return done, nil
}

// Punch frees whole blocks of a range, as a device does when it is told to
// discard them.
func (f *MemoryImage) Punch(off, length int64) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	for n := range f.image.data.blocks {
		if at := n * memoryBlockSize; at >= off && at+memoryBlockSize <= off+length {
			f.m.used -= f.image.data.drop(n)
		}
	}
}

// Close implements io.Closer; it does nothing.
func (f *MemoryImage) Close() error { return nil }

package overlay

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"unsafe"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/internal/sys"
)

// blocks are buffers of one block.
var blocks = sync.Pool{New: func() any { b := aligned(BlockSize); return &b }}

// aligned makes a buffer that may go to a file opened with O_DIRECT.
func aligned(n int) []byte {
	b := make([]byte, n+BlockSize)
	over := int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) % BlockSize)
	return b[BlockSize-over : BlockSize-over+n]
}

// OSFile is a File of the host. One of a layer's data may be opened with O_DIRECT;
// what is read and written by others than this package has to be aligned then.
type OSFile struct{ *os.File }

// WriteAt implements File; a full pool is blockdev.ErrNoSpace.
func (f OSFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(p, off)
	return n, noSpace(err)
}

// Sync implements File by fdatasync(2).
func (f OSFile) Sync() error { return sys.SyncData(f.File) }

// Punch implements File.
func (f OSFile) Punch(off, n int64) error { return noSpace(sys.PunchHole(f.File, off, n)) }

// Allocate occupies space for the first size bytes, where the filesystem can. A full
// pool is blockdev.ErrNoSpace.
func (f OSFile) Allocate(size int64) error { return noSpace(untold(sys.Allocate(f.File, 0, size))) }

// Extent implements Extenter.
func (f OSFile) Extent(off, limit int64) (length int64, hole bool, err error) {
	return extent.At(f.File, off, limit)
}

// Witnesses implements Witness. ext4 and XFS turn a hole that is written past the page
// cache into data when the write is complete, block by block, and their journals keep
// that order (docs/decisions). Where their blocks are not ours a part would count
// for the whole.
func (f OSFile) Witnesses() bool {
	direct, err := sys.DirectAlignment(f.File)
	if err != nil || direct == 0 {
		return false
	}
	kind, err := sys.FilesystemMagic(f.File)
	if err != nil || kind != sys.MagicExt4 && kind != sys.MagicXFS {
		return false
	}
	block, err := sys.FilesystemBlock(f.File)
	return err == nil && block == BlockSize
}

// Written implements Witness. errors.ErrUnsupported where the filesystem cannot tell, or
// not of blocks as small as ours.
func (f OSFile) Written(off, end int64, fn func(from, to int64)) error {
	if block, err := sys.FilesystemBlock(f.File); err != nil || block > BlockSize {
		return errors.Join(err, errors.ErrUnsupported)
	}
	return sys.EachWritten(f.File, off, end, fn)
}

// ShareInto implements Sharer.
func (f OSFile) ShareInto(dst File, off, n int64) error { return shareInto(dst, f.File, off, n) }

func shareInto(dst File, src *os.File, off, n int64) error {
	to, ok := dst.(OSFile)
	if !ok {
		return errors.ErrUnsupported
	}
	err := sys.CloneRange(to.File, off, src, off, n)
	if sys.IsNoReflink(err) {
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return noSpace(err)
}

func noSpace(err error) error {
	if sys.IsNoSpace(err) {
		return fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	return err
}

// Image is a Source in a file of this host, which nobody writes.
type Image struct {
	f    *os.File
	size int64
}

// NewImage gives the base that a file or a block device of size bytes is.
func NewImage(f *os.File, size int64) *Image { return &Image{f, size} }

// ReadAt implements Source.
func (i *Image) ReadAt(p []byte, off int64) (int, error) { return i.f.ReadAt(p, off) }

// ShareInto implements Sharer, for a file.
func (i *Image) ShareInto(dst File, off, n int64) error { return shareInto(dst, i.f, off, n) }

// Size implements Source.
func (i *Image) Size() int64 { return i.size }

// Next implements Source. Where the file cannot tell, a block device, all is data.
func (i *Image) Next(off int64) (from, to int64, err error) {
	for off < i.size {
		n, hole, err := extent.At(i.f, off, i.size-off)
		if err != nil || !hole {
			return off, off + n, err
		}
		off += n
	}
	return 0, 0, io.EOF
}

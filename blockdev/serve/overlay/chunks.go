package overlay

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"holdfast/blockdev"
)

// Chunks says what a base that is far away consists of. Of the digests nothing is kept
// in memory but which chunks are zeroes: a bit each.
type Chunks struct {
	Size    int64       // of the image, bytes
	Chunk   int64       // of a chunk, bytes: a power of two from BlockSize to 4 MiB; the last one may be shorter
	Digests io.ReaderAt // SHA-256 of each, in order, 32 bytes each; all zeroes: the chunk is all zeroes and is never fetched

	zeroes []uint64 // a bit for each chunk of zeroes, the first in the lowest; nil: not looked at yet
}

const (
	// DefaultChunk is the chunk, in bytes, that a new base is best digested by: a miss
	// of one block fetches and verifies a whole one, and each costs 32 bytes of a file.
	DefaultChunk = 64 << 10

	maxChunk = 4 << 20
)

func (c Chunks) check() error {
	switch {
	case c.Size <= 0 || c.Size > maxSize:
		return fmt.Errorf("%w: a base of %d bytes", blockdev.ErrInvalid, c.Size)
	case c.Chunk < BlockSize || c.Chunk > maxChunk || c.Chunk&(c.Chunk-1) != 0:
		return fmt.Errorf("%w: chunks of %d bytes", blockdev.ErrInvalid, c.Chunk)
	case c.Digests == nil:
		return fmt.Errorf("%w: no digests", blockdev.ErrInvalid)
	}
	return nil
}

func (c Chunks) count() int64 { return (c.Size + c.Chunk - 1) / c.Chunk }

func (c Chunks) zero(i int64) bool { return c.zeroes[i/64]>>(i%64)&1 != 0 }

// digest is what a chunk's SHA-256 has to be.
func (c Chunks) digest(i int64) (sum [sha256.Size]byte, err error) {
	if _, err := c.Digests.ReadAt(sum[:], i*sha256.Size); err != nil {
		return sum, fmt.Errorf("digest of chunk %d: %w", i, err)
	}
	return sum, nil
}

// scan goes through all digests, many at once: each gets the next ones. It ends with
// io.ErrUnexpectedEOF where there are less.
func (c Chunks) scan(each func(sums []byte) error) error {
	buf := make([]byte, 2048*sha256.Size)
	for at, end := int64(0), c.count()*sha256.Size; at < end; {
		part := buf[:min(int64(len(buf)), end-at)]
		n, err := c.Digests.ReadAt(part, at)
		switch {
		case n == len(part):
		case errors.Is(err, io.EOF):
			return io.ErrUnexpectedEOF
		default:
			return err
		}
		if err := each(part); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// findZeroes learns which chunks are zeroes, and gives sum, if there is one, all digests.
func (c *Chunks) findZeroes(sum hash.Hash) error {
	zeroes, i := make([]uint64, (c.count()+63)/64), int64(0)
	err := c.scan(func(sums []byte) error {
		if sum != nil {
			sum.Write(sums)
		}
		for ; len(sums) > 0; sums = sums[sha256.Size:] {
			if [sha256.Size]byte(sums) == [sha256.Size]byte{} {
				zeroes[i/64] |= 1 << (i % 64)
			}
			i++
		}
		return nil
	})
	if err == nil {
		c.zeroes = zeroes
	}
	return err
}

func (c Chunks) length(i int64) int64 { return c.lengthOf(i, i+1) }

// lengthOf is how many bytes the chunks [first, end) have.
func (c Chunks) lengthOf(first, end int64) int64 { return min(end*c.Chunk, c.Size) - first*c.Chunk }

// Digest reads a base and gives what it consists of, in chunks of so many bytes: 32
// bytes of memory for each. Holes cost nothing. blockdev.ErrInvalid for a chunk that is none.
func Digest(base Source, chunk int64) (Chunks, error) {
	c, err := digest(base, chunk)
	return c, blockdev.Op("overlay.Digest", "", err)
}

func digest(base Source, chunk int64) (Chunks, error) {
	c := Chunks{Size: base.Size(), Chunk: chunk, Digests: bytes.NewReader(nil)}
	if err := c.check(); err != nil {
		return Chunks{}, err
	}
	sums := make([]byte, c.count()*sha256.Size)
	p := aligned(int(chunk))
	for off := int64(0); off < c.Size; {
		from, _, err := base.Next(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return Chunks{}, err
		}
		i := from / chunk
		part := p[:c.length(i)]
		if err := readWhole(base, part, i*chunk); err != nil {
			return Chunks{}, err
		}
		if !empty(part) {
			sum := sha256.Sum256(part)
			copy(sums[i*sha256.Size:], sum[:])
		}
		off = (i + 1) * chunk
	}
	c.Digests = bytes.NewReader(sums)
	return c, nil
}

// A file of chunks is a header of 64 bytes and the digests, in order. The header has
// the magic, the version and the size of a chunk as 32 bits, the image's size as 64
// bits, all little-endian, zeroes, and from byte 32 on the SHA-256 of those 32 bytes
// and the digests.
const (
	chunksMagic   = "HFCHUNK\x00"
	chunksVersion = 1
	chunksHeader  = 64
	chunksSum     = 32 // where the checksum stands
)

// header is that of a file, without its checksum.
func (c Chunks) header() []byte {
	head := make([]byte, chunksSum, chunksHeader)
	copy(head, chunksMagic)
	binary.LittleEndian.PutUint32(head[8:], chunksVersion)
	binary.LittleEndian.PutUint32(head[12:], uint32(c.Chunk)) //nolint:gosec // checked
	binary.LittleEndian.PutUint64(head[16:], uint64(c.Size))  //nolint:gosec // checked
	return head
}

// WriteChunks writes the file that ReadChunks reads; to make it durable is the
// caller's. blockdev.ErrInvalid for chunks that are none.
func WriteChunks(w io.Writer, c Chunks) error {
	return blockdev.Op("overlay.WriteChunks", "", writeChunks(w, c))
}

func writeChunks(w io.Writer, c Chunks) error {
	if err := c.check(); err != nil {
		return err
	}
	head, sum := c.header(), sha256.New()
	sum.Write(head)
	switch err := c.findZeroes(sum); {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: less than %d digests", blockdev.ErrInvalid, c.count())
	case err != nil:
		return err
	}
	if _, err := w.Write(sum.Sum(head)); err != nil {
		return err
	}
	return c.scan(func(sums []byte) error {
		_, err := w.Write(sums)
		return err
	})
}

// ReadChunks checks what WriteChunks wrote, from the beginning of f, and gives it.
// The digests stay in f, which has to stay open and as it is as long as they are used.
// blockdev.ErrCorrupt for anything else.
func ReadChunks(f io.ReaderAt) (Chunks, error) {
	c, err := readChunks(f)
	return c, blockdev.Op("overlay.ReadChunks", "", err)
}

func readChunks(f io.ReaderAt) (Chunks, error) {
	head := make([]byte, chunksHeader)
	if n, err := f.ReadAt(head, 0); n < len(head) {
		return Chunks{}, cutShort(err)
	}
	switch {
	case string(head[:8]) != chunksMagic:
		return Chunks{}, fmt.Errorf("%w: this is no file of chunks", blockdev.ErrCorrupt)
	case binary.LittleEndian.Uint32(head[8:]) != chunksVersion:
		return Chunks{}, fmt.Errorf("%w: chunks of version %d, this program knows %d", blockdev.ErrCorrupt, binary.LittleEndian.Uint32(head[8:]), chunksVersion)
	}
	c := Chunks{Chunk: int64(binary.LittleEndian.Uint32(head[12:])), Size: int64(binary.LittleEndian.Uint64(head[16:]))} //nolint:gosec // checked next
	c.Digests = io.NewSectionReader(f, chunksHeader, (maxSize/BlockSize)*sha256.Size)
	if err := c.check(); err != nil {
		return Chunks{}, fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	if last := (c.count() - 1) * sha256.Size; last > 0 { // no more memory than there are bytes
		if _, err := c.Digests.ReadAt(make([]byte, sha256.Size), last); err != nil {
			return Chunks{}, cutShort(err)
		}
	}
	sum := sha256.New()
	sum.Write(c.header())
	if err := c.findZeroes(sum); err != nil {
		return Chunks{}, cutShort(err)
	}
	if string(sum.Sum(c.header())) != string(head) {
		return Chunks{}, fmt.Errorf("%w: the chunks' checksum differs", blockdev.ErrCorrupt)
	}
	return c, nil
}

// cutShort tells a file that ends too early from one that cannot be read.
func cutShort(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: the chunks end early", blockdev.ErrCorrupt)
	}
	return err
}

package overlay

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"holdfast/blockdev"
)

// Chunks says what a base that is far away consists of.
type Chunks struct {
	Size    int64      // of the image, bytes
	Chunk   int64      // of a chunk, bytes: a power of two from BlockSize to 4 MiB; the last one may be shorter
	Digests [][32]byte // SHA-256 of each; all zeroes: the chunk is all zeroes and is never fetched
}

const (
	// DefaultChunk is the chunk, in bytes, that a new base is best digested by: a miss
	// of one block fetches and verifies a whole one, and each costs 32 bytes of memory.
	DefaultChunk = 64 << 10

	maxChunk = 4 << 20
)

func (c Chunks) check() error {
	switch {
	case c.Size <= 0 || c.Size > maxSize:
		return fmt.Errorf("%w: a base of %d bytes", blockdev.ErrInvalid, c.Size)
	case c.Chunk < BlockSize || c.Chunk > maxChunk || c.Chunk&(c.Chunk-1) != 0:
		return fmt.Errorf("%w: chunks of %d bytes", blockdev.ErrInvalid, c.Chunk)
	case int64(len(c.Digests)) != c.count():
		return fmt.Errorf("%w: %d digests of %d chunks", blockdev.ErrInvalid, len(c.Digests), c.count())
	}
	return nil
}

func (c Chunks) count() int64 { return (c.Size + c.Chunk - 1) / c.Chunk }

func (c Chunks) zero(i int64) bool { return c.Digests[i] == [32]byte{} }

func (c Chunks) length(i int64) int64 { return min(c.Chunk, c.Size-i*c.Chunk) }

// Digest reads a base and gives what it consists of, in chunks of so many bytes.
// Holes cost nothing. blockdev.ErrInvalid for a chunk that is none.
func Digest(base Source, chunk int64) (Chunks, error) {
	c, err := digest(base, chunk)
	return c, blockdev.Op("overlay.Digest", "", err)
}

func digest(base Source, chunk int64) (Chunks, error) {
	c := Chunks{Size: base.Size(), Chunk: chunk}
	if chunk >= BlockSize && c.Size > 0 && c.Size <= maxSize {
		c.Digests = make([][32]byte, c.count())
	}
	if err := c.check(); err != nil {
		return Chunks{}, err
	}
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
			c.Digests[i] = sha256.Sum256(part)
		}
		off = (i + 1) * chunk
	}
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

func (c Chunks) header() []byte {
	head := make([]byte, chunksSum, chunksHeader)
	copy(head, chunksMagic)
	binary.LittleEndian.PutUint32(head[8:], chunksVersion)
	binary.LittleEndian.PutUint32(head[12:], uint32(c.Chunk)) //nolint:gosec // checked
	binary.LittleEndian.PutUint64(head[16:], uint64(c.Size))  //nolint:gosec // checked
	sum := sha256.New()
	sum.Write(head)
	for i := range c.Digests {
		sum.Write(c.Digests[i][:])
	}
	return sum.Sum(head)
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
	if _, err := w.Write(c.header()); err != nil {
		return err
	}
	buf := make([]byte, 0, 2048*sha256.Size)
	for i := range c.Digests {
		buf = append(buf, c.Digests[i][:]...)
		if len(buf) == cap(buf) || i == len(c.Digests)-1 {
			if _, err := w.Write(buf); err != nil {
				return err
			}
			buf = buf[:0]
		}
	}
	return nil
}

// ReadChunks reads what WriteChunks wrote, from the beginning of f.
// blockdev.ErrCorrupt for anything else.
func ReadChunks(f io.ReaderAt) (Chunks, error) {
	c, err := readChunks(io.NewSectionReader(f, 0, chunksHeader+(maxSize/BlockSize)*sha256.Size))
	return c, blockdev.Op("overlay.ReadChunks", "", err)
}

func readChunks(r io.Reader) (Chunks, error) {
	head := make([]byte, chunksHeader)
	if _, err := io.ReadFull(r, head); err != nil {
		return Chunks{}, cutShort(err)
	}
	switch {
	case string(head[:8]) != chunksMagic:
		return Chunks{}, fmt.Errorf("%w: this is no file of chunks", blockdev.ErrCorrupt)
	case binary.LittleEndian.Uint32(head[8:]) != chunksVersion:
		return Chunks{}, fmt.Errorf("%w: chunks of version %d, this program knows %d", blockdev.ErrCorrupt, binary.LittleEndian.Uint32(head[8:]), chunksVersion)
	}
	c := Chunks{Chunk: int64(binary.LittleEndian.Uint32(head[12:])), Size: int64(binary.LittleEndian.Uint64(head[16:]))} //nolint:gosec // checked next
	if c.Chunk < BlockSize || c.Chunk > maxChunk || c.Size <= 0 || c.Size > maxSize {
		return Chunks{}, fmt.Errorf("%w: a base of %d bytes in chunks of %d", blockdev.ErrCorrupt, c.Size, c.Chunk)
	}
	for buf := make([]byte, 2048*sha256.Size); int64(len(c.Digests)) < c.count(); { // no more memory than there are bytes
		part := buf[:min(int64(len(buf)), (c.count()-int64(len(c.Digests)))*sha256.Size)]
		if _, err := io.ReadFull(r, part); err != nil {
			return Chunks{}, cutShort(err)
		}
		for ; len(part) > 0; part = part[sha256.Size:] {
			c.Digests = append(c.Digests, [32]byte(part))
		}
	}
	if err := c.check(); err != nil {
		return Chunks{}, fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	if string(c.header()) != string(head) {
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

package extent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// Piece is the unit in bytes in which a Digester reads.
const Piece = 1 << 20

// zeroes is a piece without data.
var zeroes [Piece]byte

// Digester digests what a file holds, a part at a time, so that somebody else can
// use the file in between. The digest is of the contents: whether a range of
// zeroes is a hole or written makes no difference, and holes are not read. It is
// the SHA-256 of "holdfast image 1\n", the size as 8 bytes, the least first, and for
// each Piece its SHA-256, or 32 zeroes when it is zero throughout; the last piece
// may be shorter.
type Digester struct {
	// KeepCache lets Next read what the page cache has, and leaves it there.
	// Without it the cache is passed by: what is read is what the device has.
	KeepCache bool

	sum  hash.Hash
	size int64
	next int64 // the first byte that was not looked at
	buf  []byte
}

// NewDigester digests files of size bytes.
func NewDigester(size int64) *Digester {
	d := &Digester{sum: sha256.New(), size: size, buf: make([]byte, Piece)}
	d.sum.Write([]byte("holdfast image 1\n"))
	d.sum.Write(binary.LittleEndian.AppendUint64(nil, uint64(size))) //nolint:gosec // not negative
	return d
}

// skip takes everything up to a piece as zeroes.
func (d *Digester) skip(to int64) {
	for ; d.next < to; d.next += Piece {
		d.sum.Write(zeroes[:sha256.Size])
	}
}

// Next goes on with f, reading at most about most bytes, and tells how many it
// read and whether that was all. f must hold the same in each call. Errors of
// reading are the kernel's: EIO is damage as well.
func (d *Digester) Next(ctx context.Context, f *os.File, most int64) (read int64, done bool, err error) {
	for d.next < d.size && read < most {
		if err := ctx.Err(); err != nil {
			return read, false, err
		}
		at, ok, err := sys.NextData(f, d.next)
		if err != nil {
			return read, false, blockdev.Op("extent.Digest", "", err)
		}
		if !ok || at >= d.size {
			d.skip(d.size)
			break
		}
		at = at / Piece * Piece
		d.skip(at)
		n, err := d.piece(f, at)
		read += n
		if err != nil {
			return read, false, blockdev.Op("extent.Digest", "", err)
		}
		d.next = at + Piece
	}
	return read, d.next >= d.size, nil
}

func (d *Digester) piece(f *os.File, at int64) (int64, error) {
	b := d.buf[:min(Piece, d.size-at)]
	if !d.KeepCache {
		sys.DropCache(f, at, int64(len(b)))
		defer sys.DropCache(f, at, int64(len(b)))
	}
	n, err := f.ReadAt(b, at)
	if err != nil && !(errors.Is(err, io.EOF) && n == len(b)) {
		return int64(n), fmt.Errorf("read at %d: %w", at, err)
	}
	if bytes.Equal(b, zeroes[:len(b)]) {
		d.sum.Write(zeroes[:sha256.Size])
		return int64(n), nil
	}
	sum := sha256.Sum256(b)
	d.sum.Write(sum[:])
	return int64(n), nil
}

// Sum is the digest once Next is done, as "sha256:..." in hexadecimal.
func (d *Digester) Sum() string { return fmt.Sprintf("sha256:%x", d.sum.Sum(nil)) }

// Digest digests a whole file of size bytes at once, through the page cache.
func Digest(ctx context.Context, f *os.File, size int64) (string, error) {
	d := NewDigester(size)
	d.KeepCache = true
	for {
		if _, done, err := d.Next(ctx, f, step); err != nil || done {
			return d.Sum(), err
		}
	}
}

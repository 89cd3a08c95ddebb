package remote

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"holdfast/blockdev/extent"
)

// A stream carries a sparse image: the head as one line of JSON, then pieces, each
// its offset (64 bits) and length (32 bits), little-endian, and its bytes, ascending;
// then one of length 0 at the image's size, without which the stream is cut short.

// ErrStream means that a stream of an image is none, or ended early.
var ErrStream = errors.New("stream of an image is not whole")

// maxPiece bounds the bytes of a piece.
const maxPiece = 1 << 20

// maxHead bounds the first line, in bytes.
const maxHead = 4096

// Send writes the data of an image file as a stream.
func Send(ctx context.Context, w io.Writer, h Head, from *os.File) error {
	line, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if _, err := w.Write(append(line, '\n')); err != nil {
		return err
	}
	buf := make([]byte, maxPiece)
	err = extent.Each(ctx, from, func(r extent.Range) error {
		for at, end := r.Offset, min(r.End(), h.Size); at < end; {
			p := buf[:min(maxPiece, end-at)]
			if _, err := from.ReadAt(p, at); err != nil {
				return err
			}
			if err := sendPiece(w, at, p); err != nil {
				return err
			}
			at += int64(len(p))
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	return sendPiece(w, h.Size, nil)
}

func sendPiece(w io.Writer, at int64, p []byte) error {
	var head [12]byte
	binary.LittleEndian.PutUint64(head[:], uint64(at))      //nolint:gosec // an offset
	binary.LittleEndian.PutUint32(head[8:], uint32(len(p))) //nolint:gosec // at most maxPiece
	if _, err := w.Write(head[:]); err != nil || len(p) == 0 {
		return err
	}
	_, err := w.Write(p)
	return err
}

// receive reads a stream into an empty file, which is as large as the image then.
func receive(r *bufio.Reader, h Head, to *os.File, progress func(done, size int64)) error {
	if err := to.Truncate(h.Size); err != nil {
		return err
	}
	buf := make([]byte, maxPiece)
	for last := int64(0); ; {
		var head [12]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return fmt.Errorf("%w: %w", ErrStream, err)
		}
		at, n := int64(binary.LittleEndian.Uint64(head[:])), int64(binary.LittleEndian.Uint32(head[8:])) //nolint:gosec // checked next
		switch {
		case n == 0 && at == h.Size:
			return nil
		case n == 0 || n > maxPiece || at < last || at > h.Size-n:
			return fmt.Errorf("%w: %d bytes at %d", ErrStream, n, at)
		}
		p := buf[:n]
		if _, err := io.ReadFull(r, p); err != nil {
			return fmt.Errorf("%w: %w", ErrStream, err)
		}
		if _, err := to.WriteAt(p, at); err != nil {
			return err
		}
		last = at + n
		if progress != nil {
			progress(last, h.Size)
		}
	}
}

func readHead(r *bufio.Reader) (h Head, err error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return h, fmt.Errorf("%w: %w", ErrStream, err)
	}
	if err := json.Unmarshal(line, &h); err != nil {
		return h, fmt.Errorf("%w: %w", ErrStream, err)
	}
	if err := h.check(); err != nil {
		return h, fmt.Errorf("%w: %w", ErrStream, err)
	}
	return h, nil
}

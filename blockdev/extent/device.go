package extent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// sizeOf is where f ends. device: it is none of the files whose status says so, it
// cannot be made larger, and it does not tell its holes.
func sizeOf(f *os.File) (size int64, device bool, err error) {
	status, err := sys.StatusOf(f)
	if err != nil || status.Size > 0 {
		return status.Size, false, err
	}
	size, err = f.Seek(0, io.SeekEnd)
	return size, size > 0, err
}

// enlarge makes dst at least size bytes large. blockdev.ErrNoSpace for a device that
// is not.
func enlarge(dst *os.File, size int64) error {
	have, device, err := sizeOf(dst)
	switch {
	case err != nil || have >= size:
		return err
	case device:
		return fmt.Errorf("%w: the device has %d bytes and %d are needed", blockdev.ErrNoSpace, have, size)
	}
	return dst.Truncate(size)
}

// sift copies the blocks of a range that are not zero: of a device, all of which
// looks like data.
func sift(ctx context.Context, dst, src *os.File, r Range) (copied int64, err error) {
	buf := make([]byte, min(chunk, r.Length))
	for at := r.Offset; at < r.End(); at += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return copied, err
		}
		buf = buf[:min(int64(len(buf)), r.End()-at)]
		if _, err := src.ReadAt(buf, at); errors.Is(err, io.EOF) {
			return copied, io.ErrUnexpectedEOF // src shrank
		} else if err != nil {
			return copied, err
		}
		n, err := writeBlocks(dst, buf, at)
		copied += n
		if err != nil {
			return copied, err
		}
	}
	return copied, nil
}

// writeBlocks writes the runs of blocks in b that are not zero.
func writeBlocks(dst *os.File, b []byte, at int64) (written int64, err error) {
	for from := 0; from < len(b); {
		to := from
		for to < len(b) && !zeroBlock(b[to:min(to+Block, len(b))]) {
			to = min(to+Block, len(b))
		}
		if to > from {
			n, err := dst.WriteAt(b[from:to], at+int64(from))
			written += int64(n)
			if err != nil {
				return written, err
			}
		}
		from = to + Block // what ended the run is zero
	}
	return written, nil
}

func zeroBlock(b []byte) bool { return bytes.Equal(b, zeroes[:len(b)]) }

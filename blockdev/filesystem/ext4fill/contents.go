package ext4fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
)

// Files are Contents: store i of a tree's runs is the i-th file. The bytes are
// shared by reflink where the filesystem of both can, else copied.
type Files []*os.File

// step is how much is copied between two looks at the context, in bytes.
const step = 8 << 20

// Place is the method of Contents.
func (s Files) Place(ctx context.Context, image *os.File, at int64, r tree.Run) error {
	if r.Store < 0 || r.Store >= len(s) {
		return invalid("store %d of %d", r.Store, len(s))
	}
	from := s[r.Store]
	err := sys.CloneRange(image, at, from, r.At, r.Length)
	if !sys.IsNoReflink(err) {
		return err
	}
	for done := int64(0); done < r.Length; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := sys.CopyRange(image, at+done, from, r.At+done, min(step, r.Length-done))
		if errors.Is(err, errors.ErrUnsupported) {
			n, err = copyThrough(image, at+done, from, r.At+done, min(step, r.Length-done))
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("copying contents: %w", err)
		}
		done += n
	}
	return nil
}

func copyThrough(to *os.File, at int64, from *os.File, off, length int64) (int64, error) {
	return io.Copy(io.NewOffsetWriter(to, at), io.NewSectionReader(from, off, length))
}

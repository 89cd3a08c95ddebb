package overlay

import (
	"errors"
	"time"
)

// Sharer is a File or a Source whose filesystem can let another file have its bytes
// without a copy.
type Sharer interface {
	// ShareInto makes a range of dst, of whole blocks, share the bytes of the same range
	// of this one, copy-on-write; holes become holes. Each block of dst is what it was
	// or what it is to be, also after a crash, and it is durable after a Sync of dst, as
	// far as this one's bytes are durable. errors.ErrUnsupported where these two files
	// cannot; then nothing has changed.
	ShareInto(dst File, off, n int64) error
}

const (
	// A clone takes some 30 µs for each extent (XFS, of 4 KiB: half of what a copy of
	// them takes) and the kernel keeps everybody out of both files meanwhile. Extents
	// are not known beforehand: so it begins with little, and takes more as long as that
	// is quick.
	shareLeast = 256 << 10 // bytes
	shareMost  = 8 << 20
	shareQuick = time.Millisecond
)

// ShareCost is what a call of ShareInto counts for where copying is bounded, in bytes:
// it changes metadata only.
const ShareCost = 64 << 10

// sharing brings blocks from one file or source by sharing as long as that is possible.
type sharing struct {
	from   Sharer // nil: it is not
	atOnce int64  // bytes
}

func shareFrom(from any) *sharing {
	s, _ := from.(Sharer)
	return &sharing{s, shareLeast}
}

// most is how much may be brought at once, in bytes, where copying takes copied.
func (s *sharing) most(copied int64) int64 {
	if s.from == nil {
		return copied
	}
	return s.atOnce
}

// into has a file share a run of blocks; done is false where they have to be copied. The
// caller has them locked alone, where others may want them. What a layer gets so from
// below is what it reads as already: so it may be found there, or not, after any crash
// before what is below goes, which waits for the whole map.
func (s *sharing) into(dst File, r run) (done bool, err error) {
	if s.from == nil {
		return false, nil
	}
	begun := time.Now()
	err = s.from.ShareInto(dst, r.first*BlockSize, (r.end-r.first)*BlockSize)
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		s.from = nil
		return false, nil
	case err != nil:
		return false, err
	case time.Since(begun) > shareQuick:
		s.atOnce = max(s.atOnce/2, shareLeast)
	default:
		s.atOnce = min(s.atOnce*2, shareMost)
	}
	return true, nil
}

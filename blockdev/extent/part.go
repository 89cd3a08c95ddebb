package extent

import (
	"context"
	"errors"
	"fmt"
	"os"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// CopyPart is Copy of one image to another, by their paths, from an offset on, until
// about most bytes have been read or all have: next is where to go on, the size of
// src at the end. What it tells to be copied is durable. Done again from an earlier
// offset it does the same, as long as nobody has written to src.
func CopyPart(ctx context.Context, dst, src string, from, most int64) (next, copied int64, err error) {
	in, err := os.Open(src)
	if err != nil {
		return from, 0, blockdev.Op("extent.CopyPart", "", err)
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	out, err := os.OpenFile(dst, os.O_RDWR, 0)
	if err != nil {
		return from, 0, blockdev.Op("extent.CopyPart", "", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	next, copied, err = copyPart(ctx, out, in, from, most)
	if err == nil {
		err = sys.SyncData(out)
	}
	if sys.IsNoSpace(err) {
		err = fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	if err != nil {
		return from, 0, blockdev.Op("extent.CopyPart", "", err)
	}
	return next, copied, nil
}

func copyPart(ctx context.Context, dst, src *os.File, from, most int64) (next, copied int64, err error) {
	size, device, err := sizeOf(src)
	if err != nil {
		return from, 0, err
	}
	if err := enlarge(dst, size); err != nil {
		return from, 0, err
	}
	one := copyRange
	if device {
		one = sift
	}
	for next = from; next < size && most > 0; {
		r, err := nextRange(src, next, size, device)
		if err != nil {
			return next, copied, err
		}
		if r.Length == 0 {
			return size, copied, nil
		}
		r.Length = min(r.Length, most)
		n, err := one(ctx, dst, src, r)
		copied += n
		if err != nil {
			return next, copied, err
		}
		most -= r.Length
		next = r.End()
	}
	return next, copied, nil
}

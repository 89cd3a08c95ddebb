package extent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

const (
	// step is how much is copied or read between two looks at the context.
	step = 8 << 20
	// chunk is how much is read at once when bytes pass through us.
	chunk = 1 << 20
	// Block is the granularity of Trim, and of copies of devices, in bytes.
	Block = 4096
)

// Range is a part of a file, in bytes.
type Range struct{ Offset, Length int64 }

// End is the offset behind the range.
func (r Range) End() int64 { return r.Offset + r.Length }

// Each calls fn with the ranges of f that hold data, in order, until fn returns
// an error, which Each returns. What lies between them reads as zero. A file on
// a filesystem that does not know holes, and a device, is one range. f is not
// written meanwhile; its file position is changed.
func Each(ctx context.Context, f *os.File, fn func(Range) error) error {
	size, device, err := sizeOf(f)
	for at := int64(0); err == nil && at < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := nextRange(f, at, size, device)
		if err != nil || r.Length == 0 {
			return err
		}
		if err := fn(r); err != nil {
			return err
		}
		at = r.End()
	}
	return err
}

// nextRange is the first range of data from an offset on, in a file of size bytes; its
// Length is 0 where there is no more.
func nextRange(f *os.File, at, size int64, device bool) (Range, error) {
	if device {
		return Range{Offset: at, Length: size - at}, nil
	}
	start, ok, err := sys.NextData(f, at)
	if err != nil || !ok {
		return Range{}, err
	}
	end, err := sys.NextHole(f, start)
	if err != nil || start >= min(end, size) {
		return Range{}, err
	}
	return Range{Offset: start, Length: min(end, size) - start}, nil
}

// At tells whether the bytes at off are a hole, which reads as zero, and how far
// that goes: 1 to limit bytes. Space that a filesystem keeps unwritten counts as a
// hole. Where holes are not known all is data. f's file position is changed.
func At(f *os.File, off, limit int64) (length int64, hole bool, err error) {
	at, found, err := sys.NextData(f, off)
	switch {
	case err != nil && (errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported)):
		return limit, false, nil // a block device, or a filesystem without
	case err != nil:
		return 0, false, err
	case !found:
		return limit, true, nil
	case at > off:
		return min(at-off, limit), true, nil
	}
	end, err := sys.NextHole(f, off)
	if err != nil {
		return 0, false, err
	}
	// Somebody may have punched a hole in between: then off is one, of a byte at least.
	return max(1, min(end-off, limit)), false, nil
}

// Map collects what Each tells.
func Map(ctx context.Context, f *os.File) (ranges []Range, err error) {
	err = Each(ctx, f, func(r Range) error { ranges = append(ranges, r); return nil })
	return ranges, blockdev.Op("extent.Map", "", err)
}

// Copy copies the data of src into dst at the same offsets, never the holes, and
// tells the bytes copied. dst is empty or all holes before, or a device that reads
// as zero; a file is made at least as large as src. Of a device, blocks of zeroes
// count as holes. Not durable: the caller flushes dst. blockdev.ErrNoSpace when it
// does not fit.
func Copy(ctx context.Context, dst, src *os.File) (copied int64, err error) {
	copied, err = copyAll(ctx, dst, src, copyRange)
	return copied, blockdev.Op("extent.Copy", "", err)
}

// Rewrite is Copy, but always writes: where Copy would share the pieces of src,
// as they lie, Rewrite gives dst pieces of its own, laid out in order.
func Rewrite(ctx context.Context, dst, src *os.File) (copied int64, err error) {
	copied, err = copyAll(ctx, dst, src, writeRange)
	return copied, blockdev.Op("extent.Rewrite", "", err)
}

func copyAll(ctx context.Context, dst, src *os.File, one func(ctx context.Context, dst, src *os.File, r Range) (int64, error)) (copied int64, err error) {
	size, device, err := sizeOf(src)
	if err != nil {
		return 0, err
	}
	if device {
		one = sift
	}
	if err = enlarge(dst, size); err == nil {
		err = Each(ctx, src, func(r Range) error {
			n, err := one(ctx, dst, src, r)
			copied += n
			return err
		})
	}
	if sys.IsNoSpace(err) {
		err = fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	return copied, err
}

func writeRange(ctx context.Context, dst, src *os.File, r Range) (copied int64, err error) {
	for copied < r.Length {
		if err := ctx.Err(); err != nil {
			return copied, err
		}
		n, err := copyThrough(dst, src, r.Offset+copied, min(step, r.Length-copied))
		copied += n
		if err != nil {
			return copied, err
		}
		if n == 0 {
			return copied, io.ErrUnexpectedEOF // src shrank
		}
	}
	return copied, nil
}

func copyRange(ctx context.Context, dst, src *os.File, r Range) (copied int64, err error) {
	for copied < r.Length {
		if err := ctx.Err(); err != nil {
			return copied, err
		}
		at, want := r.Offset+copied, min(step, r.Length-copied)
		n, err := sys.CopyRange(dst, at, src, at, want)
		if errors.Is(err, errors.ErrUnsupported) || (err == nil && n == 0) {
			// The kernel gives 0 also for files whose size it does not know.
			n, err = copyThrough(dst, src, at, want)
		}
		copied += n
		if err != nil {
			return copied, err
		}
		if n == 0 {
			return copied, io.ErrUnexpectedEOF // src shrank
		}
	}
	return copied, nil
}

func copyThrough(dst, src *os.File, at, length int64) (int64, error) {
	return io.CopyBuffer(
		struct{ io.Writer }{io.NewOffsetWriter(dst, at)},
		struct{ io.Reader }{io.NewSectionReader(src, at, length)},
		make([]byte, min(chunk, length)))
}

// Equal reports whether two files hold the same bytes, and otherwise the offset
// of the first difference. A hole equals zeroes; only data is read. Files of
// different sizes differ at the end of the shorter one, if not before.
func Equal(ctx context.Context, a, b *os.File) (equal bool, at int64, err error) {
	at, err = firstDifference(ctx, a, b)
	return err == nil && at < 0, max(at, 0), blockdev.Op("extent.Equal", "", err)
}

// errDiffer ends a walk; it never leaves this file.
var errDiffer = errors.New("differ")

func firstDifference(ctx context.Context, a, b *os.File) (int64, error) {
	sizeA, _, errA := sizeOf(a)
	sizeB, _, errB := sizeOf(b)
	if err := errors.Join(errA, errB); err != nil {
		return 0, err
	}
	first, common := int64(-1), min(sizeA, sizeB)
	if sizeA != sizeB {
		first = common
	}
	// Data of either file is compared with the other: holes of both are skipped.
	for _, f := range []*os.File{a, b} {
		err := Each(ctx, f, func(r Range) error {
			limit := common
			if first >= 0 {
				limit = min(limit, first)
			}
			at, err := differenceIn(ctx, a, b, r, limit)
			if err == nil && at >= 0 {
				first, err = at, errDiffer
			}
			return err
		})
		if err != nil && !errors.Is(err, errDiffer) {
			return 0, err
		}
	}
	return first, nil
}

func differenceIn(ctx context.Context, a, b *os.File, r Range, limit int64) (int64, error) {
	bufA, bufB := make([]byte, chunk), make([]byte, chunk)
	for at := r.Offset; at < min(r.End(), limit); {
		if err := ctx.Err(); err != nil {
			return -1, err
		}
		n := min(chunk, min(r.End(), limit)-at)
		if _, err := a.ReadAt(bufA[:n], at); err != nil {
			return -1, err
		}
		if _, err := b.ReadAt(bufB[:n], at); err != nil {
			return -1, err
		}
		if !bytes.Equal(bufA[:n], bufB[:n]) {
			for i := range n {
				if bufA[i] != bufB[i] {
					return at + i, nil
				}
			}
		}
		at += n
	}
	return -1, nil
}

// Trim punches holes where whole blocks of f are zeroes and tells the bytes
// freed. The content stays the same. Nobody writes to f meanwhile. Not durable:
// the caller flushes f, and a crash before loses only the trimming.
func Trim(ctx context.Context, f *os.File) (freed int64, err error) {
	before, err := sys.StatusOf(f)
	if err != nil {
		return 0, blockdev.Op("extent.Trim", "", err)
	}
	ranges, err := Map(ctx, f) // first: punching changes what the walk would see
	if err != nil {
		return 0, err
	}
	for _, r := range ranges {
		if err := trimRange(ctx, f, r); err != nil {
			return 0, blockdev.Op("extent.Trim", "", err)
		}
	}
	after, err := sys.StatusOf(f)
	return max(0, before.Allocated-after.Allocated), blockdev.Op("extent.Trim", "", err)
}

func trimRange(ctx context.Context, f *os.File, r Range) error {
	buf, zero := make([]byte, chunk), make([]byte, Block)
	hole := Range{}
	punch := func() error {
		if hole.Length == 0 {
			return nil
		}
		err := sys.PunchHole(f, hole.Offset, hole.Length)
		hole = Range{}
		return err
	}
	// Ranges begin and end at filesystem blocks, except at the end of the file.
	for at := r.Offset - r.Offset%Block; at < r.End(); at += chunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.ReadAt(buf[:min(chunk, r.End()-at)], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for off := 0; off+Block <= n; off += Block {
			switch {
			case !bytes.Equal(buf[off:off+Block], zero):
				if err := punch(); err != nil {
					return err
				}
			case hole.Length == 0:
				hole = Range{Offset: at + int64(off), Length: Block}
			default:
				hole.Length += Block
			}
		}
	}
	return punch()
}

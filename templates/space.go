package templates

import (
	"cmp"
	"context"
	"errors"
	"os"
	"slices"

	"holdfast/blockdev/extent"
	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
)

const (
	// An image has at most so many holes: the cost of a clone grows with the
	// number of pieces that its source is in.
	mostHoles = 16
	// smallestHole is the least, in bytes, that is worth one.
	smallestHole = 256 << 10
)

// canShare tells whether files in a directory can share bytes, by trying it.
func canShare(dir string) (can bool, err error) {
	var files [2]*os.File
	for i := range files {
		if files[i], err = os.CreateTemp(dir, "try-"); err != nil {
			return sys.IsNoSpace(err), ignoreNoSpace(err)
		}
		defer func() { err = errors.Join(err, files[i].Close(), os.Remove(files[i].Name())) }()
	}
	if _, err = files[0].Write(make([]byte, tree.Block)); err == nil {
		err = sys.CloneFile(files[1], files[0])
	}
	if sys.IsNoReflink(err) {
		return false, nil
	}
	return err == nil || sys.IsNoSpace(err), ignoreNoSpace(err)
}

// ignoreNoSpace: a full pool is no reason not to start; a wrong guess costs a copy.
func ignoreNoSpace(err error) error {
	if sys.IsNoSpace(err) {
		return nil
	}
	return err
}

// settleSpace deals with what was allocated for an image and not written: the
// largest gaps are given back, the others are filled, so that the image is left
// in few pieces.
func settleSpace(ctx context.Context, f *os.File) error {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	gaps, err := gapsOf(ctx, f, info.Size())
	if err != nil {
		return err
	}
	slices.SortFunc(gaps, func(a, b extent.Range) int { return cmp.Compare(b.Length, a.Length) })
	for i, gap := range gaps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i < mostHoles && gap.Length >= smallestHole {
			err = sys.PunchHole(f, gap.Offset, gap.Length)
		} else {
			err = fill(f, gap)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// gapsOf tells what of a file is not data.
func gapsOf(ctx context.Context, f *os.File, size int64) (gaps []extent.Range, err error) {
	end := int64(0)
	err = extent.Each(ctx, f, func(data extent.Range) error {
		if data.Offset > end {
			gaps = append(gaps, extent.Range{Offset: end, Length: data.Offset - end})
		}
		end = data.End()
		return nil
	})
	if end < size {
		gaps = append(gaps, extent.Range{Offset: end, Length: size - end})
	}
	return gaps, err
}

func fill(f *os.File, gap extent.Range) error {
	zeroes := make([]byte, min(gap.Length, 1<<20))
	for at := gap.Offset; at < gap.End(); at += int64(len(zeroes)) {
		if _, err := f.WriteAt(zeroes[:min(int64(len(zeroes)), gap.End()-at)], at); err != nil {
			return err
		}
	}
	return nil
}

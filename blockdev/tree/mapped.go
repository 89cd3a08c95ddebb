package tree

import (
	"context"
	"fmt"
	"os"

	"holdfast/blockdev/extent"
	"holdfast/internal/sys"
)

// Mapped are Contents that stay where they are: runs say where on the file
// system's device the bytes lie (FIEMAP), so of a mounted image, where in the
// image. What is zero is left out as in a Store. Its blocks are at least Block.
type Mapped struct{}

// AddFile reads a file and digests it.
func (Mapped) AddFile(ctx context.Context, f *os.File, size int64) (*Content, error) {
	c := &Content{Size: size, Digests: make([]Digest, zeroChunks(size, true))}
	buf := make([]byte, min(Chunk, size))
	var places []sys.MappedExtent
	var ranges []extent.Range
	err := sys.EachMapped(f, func(m sys.MappedExtent) error {
		if m.Offset%Block != 0 || m.Physical%Block != 0 {
			return fmt.Errorf("an extent at %d, on the device at %d: %w", m.Offset, m.Physical, ErrUnfit)
		}
		places = append(places, m)
		if m.Offset < size {
			ranges = append(ranges, extent.Range{Offset: m.Offset, Length: min(m.Length, size-m.Offset)})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for at, i := int64(0), 0; at < size; at += Chunk {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for i < len(ranges) && ranges[i].End() <= at {
			i++
		}
		if i == len(ranges) || ranges[i].Offset >= at+Chunk {
			continue
		}
		chunk := buf[:min(Chunk, size-at)]
		if err := readRanges(f, chunk, at, ranges[i:]); err != nil {
			return nil, err
		}
		c.Digests[at/Chunk] = DigestOf(chunk)
		for run := range dataRuns(chunk) {
			c.addMapped(Run{Offset: at + int64(run.from), Length: int64(run.to - run.from)}, places[i:])
		}
	}
	return c, nil
}

// addMapped appends a run, in pieces as it lies.
func (c *Content) addMapped(r Run, places []sys.MappedExtent) {
	for _, p := range places {
		from, to := max(r.Offset, p.Offset), min(r.Offset+r.Length, p.Offset+p.Length)
		if from >= r.Offset+r.Length {
			return
		}
		if from < to {
			c.Add(Run{Offset: from, Length: to - from, At: p.Physical + from - p.Offset})
		}
	}
}

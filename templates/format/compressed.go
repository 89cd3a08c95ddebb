package format

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Decompress gives what a gzip or zstd stream holds, within limits, all of its
// members or frames; Tar passes through, within limits as well. Errors are as of
// Stream.Read. Close gives up the decoder.
func Decompress(ctx context.Context, r io.Reader, f Format, l Limits) (io.ReadCloser, error) {
	src := &source{ctx: ctx, r: r}
	s, err := decompressed(ctx, src, src, f, l.withDefaults())
	if err != nil {
		return nil, err
	}
	return s, nil
}

func decompressed(ctx context.Context, in io.Reader, src *source, f Format, l Limits) (*Stream, error) {
	d := &decoder{ctx: ctx, src: src, format: f, limits: l}
	s := &Stream{Reader: d, Format: f}
	switch f {
	case Tar:
		d.r = in
	case Gzip:
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, d.explain(err)
		}
		d.r, s.close = z, z.Close
	case Zstd:
		// One goroutine's worth: the memory is a window and two blocks.
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, d.explain(err)
		}
		d.r, s.close = z, func() error { z.Close(); return nil }
	default:
		return nil, fmt.Errorf("format %q is not a compression", f)
	}
	return s, nil
}

// decoder bounds what comes out of a decompressor and says whose fault an error is.
type decoder struct {
	ctx    context.Context //nolint:containedctx // of the one stream
	r      io.Reader
	src    *source
	format Format
	limits Limits
	out    int64
}

func (d *decoder) Read(p []byte) (int, error) {
	if err := d.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := d.r.Read(p)
	d.out += int64(n)
	if d.out > d.limits.Bytes || d.format != Tar && d.out > d.limits.allowed(d.src.n) {
		return 0, d.limits.overflow(d.format, d.out)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = d.explain(err)
	}
	return n, err
}

func (d *decoder) explain(err error) error {
	switch {
	case d.src.err != nil:
		return d.src.err
	case d.format == Tar:
		return err
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return refused("the %s is cut off after %d bytes", d.format, d.src.n)
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, zstd.ErrMagicMismatch):
		if d.out > 0 {
			return refused("the %s has something else behind its end", d.format)
		}
		return refused("this is not a %s", d.format)
	case errors.Is(err, gzip.ErrChecksum), errors.Is(err, zstd.ErrCRCMismatch):
		return refused("the %s is damaged: its checksum is wrong", d.format)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrWindowSizeTooSmall), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return refused("the %s needs a window of more than %d MiB: compress it at level 20 or below, without --long", d.format, maxWindow>>20)
	case errors.Is(err, zstd.ErrUnknownDictionary):
		return refused("the %s needs a dictionary", d.format)
	}
	return refused("the %s is damaged: %w", d.format, err)
}

package format

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"holdfast/templates/archive"
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
		z, err := newMembers(in)
		if err != nil {
			return nil, d.explain(err)
		}
		d.r, s.close = z, func() error { _ = z.gz.Close(); return nil } // it says again what Read said
	case Zstd:
		// One goroutine's worth: the memory is a window and two blocks.
		from := &taken{in: in}
		z, err := zstd.NewReader(from, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, d.explain(err)
		}
		d.r, s.close = &frames{in: from, zst: z}, func() error { z.Close(); return nil }
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
		return archive.Refuse("the %s is cut off after %d bytes", d.format, d.src.n)
	case errors.Is(err, errBehind):
		return archive.Refuse("the %s has something else behind its end", d.format)
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, zstd.ErrMagicMismatch):
		return archive.Refuse("this is not a %s", d.format)
	case errors.Is(err, gzip.ErrChecksum), errors.Is(err, zstd.ErrCRCMismatch):
		return archive.Refuse("the %s is damaged: its checksum is wrong", d.format)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrWindowSizeTooSmall), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return archive.Refuse("the %s needs a window of more than %d MiB: compress it at level 20 or below, without --long", d.format, maxWindow>>20)
	case errors.Is(err, zstd.ErrUnknownDictionary):
		return archive.Refuse("the %s needs a dictionary", d.format)
	}
	return archive.Refuse("the %s is damaged: %w", d.format, err)
}

// members reads the members of a gzip one after the other.
type members struct {
	in *bufio.Reader
	gz *gzip.Reader
}

// errBehind: what follows the last member is neither another one nor zeroes.
var errBehind = errors.New("behind the end")

func newMembers(r io.Reader) (*members, error) {
	in := bufio.NewReaderSize(r, readAhead)
	gz, err := gzip.NewReader(in) // which takes no byte too many of a bufio.Reader
	if err != nil {
		return nil, err
	}
	gz.Multistream(false)
	return &members{in, gz}, nil
}

func (m *members) Read(p []byte) (int, error) {
	for {
		n, err := m.gz.Read(p)
		if !errors.Is(err, io.EOF) || n > 0 {
			if errors.Is(err, io.EOF) {
				err = nil // it comes again
			}
			return n, err
		}
		head, err := m.in.Peek(2)
		if len(head) < 2 || head[0] != 0x1f || head[1] != 0x8b {
			return 0, m.padding(err)
		}
		if err := m.gz.Reset(m.in); err != nil {
			return 0, err
		}
		m.gz.Multistream(false)
	}
}

// padding reads what follows the last member.
func (m *members) padding(err error) error {
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return padding(m.in)
}

// padding reads zeroes to the end: io.EOF, errBehind, or the source's error.
func padding(r io.Reader) error {
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		if len(bytes.Trim(buf[:n], "\x00")) > 0 {
			return errBehind
		}
		if err != nil {
			return err
		}
	}
}

// taken passes on what a zstd decoder reads and remembers the last four bytes:
// where a frame should begin they are its magic number, and the decoder takes no
// more of them than that.
type taken struct {
	in   io.Reader
	last [4]byte
}

func (t *taken) Read(p []byte) (int, error) {
	n, err := t.in.Read(p)
	both := append(t.last[:], p[max(0, n-4):n]...)
	copy(t.last[:], both[len(both)-4:])
	return n, err
}

// frames reads the frames of a zstd and looks at what follows the last one.
type frames struct {
	in  *taken
	zst *zstd.Decoder
	out bool // there was something
}

func (f *frames) Read(p []byte) (int, error) {
	n, err := f.zst.Read(p)
	f.out = f.out || n > 0
	if errors.Is(err, zstd.ErrMagicMismatch) && f.out {
		if err = errBehind; f.in.last == [4]byte{} {
			err = padding(f.in)
		}
	}
	return n, err
}

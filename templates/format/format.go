package format

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"holdfast/templates/archive"
)

// Format is how an upload is packed.
type Format string

// The formats. OCI is an image layout or the output of `docker save`, in a tar,
// plain or compressed: package oci reads those, Open does not.
const (
	Auto Format = "" // by content; never OCI, whose tar is a tar like any other
	Tar  Format = "tar"
	Gzip Format = "tar.gz"
	Zstd Format = "tar.zst"
	Zip  Format = "zip"
	OCI  Format = "oci"
)

// Parse reads a format's name, as in ?format=. Unknown ones are an error that
// tells the known ones.
func Parse(name string) (Format, error) {
	switch f := Format(name); f {
	case Auto, Tar, Gzip, Zstd, Zip, OCI:
		return f, nil
	}
	return "", fmt.Errorf("unknown format %.40q: tar, tar.gz, tar.zst, zip or oci", name)
}

// Limits bound what an upload may become. Sizes are in bytes.
type Limits struct {
	Bytes   int64 // of the plain tar that comes out
	Entries int64 // of a zip; never more than 250,000, because its directory is held in memory
	Free    int64 // may come out whatever went in; 0: 1 GiB
	Ratio   int64 // bytes out for each byte in, above Free; 0: 200
}

// Defaults of Limits, and the bounds that hold always.
const (
	DefaultFree  = 1 << 30
	DefaultRatio = 200

	maxWindow       = 32 << 20 // of a zstd frame: what level 20 and below need
	maxZipEntries   = 250_000
	maxZipDirectory = 64 << 20
)

func (l Limits) withDefaults() Limits {
	l.Free = cmp.Or(l.Free, DefaultFree)
	l.Ratio = cmp.Or(l.Ratio, DefaultRatio)
	l.Entries = min(cmp.Or(l.Entries, maxZipEntries), maxZipEntries)
	return l
}

// allowed is how much may come out once so much went in.
func (l Limits) allowed(in int64) int64 {
	if in > (1<<62)/l.Ratio {
		return l.Bytes
	}
	return min(l.Bytes, l.Free+in*l.Ratio)
}

// overflow refuses what came out over the limits.
func (l Limits) overflow(f Format, out int64) error {
	if out > l.Bytes {
		return archive.Refuse("unpacked, the %s is larger than %d bytes", f, l.Bytes)
	}
	return archive.Refuse("the %s unpacks to more than %d times its size (looked at above %d bytes): send it as a plain tar with --sparse, or less of it", f, l.Ratio, l.Free)
}

// Options say how an upload is read.
type Options struct {
	Format  Format // Auto: by content
	Staging string // directory for the unnamed file that a zip needs: as large as the upload
	Limits  Limits
}

// Stream is the plain tar. Read's errors are the upload's own fault
// (archive.ErrRefused), or the source's and the context's, as they are. When it
// ends without an error the source was read to its end.
type Stream struct {
	io.Reader
	Format Format // what it was; never Auto
	close  func() error
}

// Close gives up what the stream holds. It does not close the source.
func (s *Stream) Close() error {
	if s.close == nil {
		return nil
	}
	return s.close()
}

// Open begins to read an upload. Errors as of Stream.Read.
func Open(ctx context.Context, r io.Reader, o Options) (*Stream, error) {
	o.Limits = o.Limits.withDefaults()
	src := &source{ctx: ctx, r: r}
	in := bufio.NewReaderSize(src, readAhead)
	f := o.Format
	if f == Auto {
		head, err := in.Peek(tarBlock)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		f = detect(head)
	}
	switch f {
	case Tar:
		return &Stream{Reader: in, Format: f}, nil
	case Gzip, Zstd:
		return decompressed(ctx, in, src, f, o.Limits)
	case Zip:
		return openZip(ctx, in, src, o)
	default:
		return nil, fmt.Errorf("format %q is not an archive", f)
	}
}

const (
	tarBlock  = 512
	readAhead = 64 << 10
)

// detect tells a format by an upload's first block, or what there is of one.
func detect(head []byte) Format {
	switch {
	case isTar(head):
		return Tar
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		return Gzip
	case bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")),
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte("\x2a\x4d\x18")): // a skippable frame
		return Zstd
	case bytes.HasPrefix(head, []byte("PK\x03\x04")), bytes.HasPrefix(head, []byte("PK\x05\x06")): // the latter: an empty one
		return Zip
	}
	return Tar
}

// isTar tells a tar's first block: by its checksum (POSIX ustar and what came
// before it; signed sums are of old Suns), or by ustar's magic, so that a damaged
// tar is called that.
func isTar(b []byte) bool {
	if len(b) < tarBlock {
		return false
	}
	if string(b[257:262]) == "ustar" {
		return true
	}
	var unsigned, signed int64
	for i, c := range b[:tarBlock] {
		if i >= 148 && i < 156 { // the sum itself counts as spaces
			c = ' '
		}
		unsigned += int64(c)
		signed += int64(int8(c)) //nolint:gosec // the sign is meant
	}
	if unsigned == 8*' ' {
		return true // nothing but zeroes around the field: an end mark
	}
	var sum int64
	digits := strings.Trim(string(b[148:156]), " \x00")
	for _, d := range digits {
		if d < '0' || d > '7' {
			return false
		}
		sum = sum*8 + int64(d-'0')
	}
	return digits != "" && (sum == unsigned || sum == signed)
}

// source is the upload. It keeps its own error apart from what a decoder makes
// of it, and counts.
type source struct {
	ctx context.Context //nolint:containedctx // of the one Open
	r   io.Reader
	n   int64
	err error
}

func (s *source) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		s.err = err
		return 0, err
	}
	n, err := s.r.Read(p)
	s.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

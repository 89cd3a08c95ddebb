package templates

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"holdfast/templates/format"
	"holdfast/templates/oci"
)

// Upload is what the URL of an upload carried.
type Upload struct {
	ID, Expires, Signature string
	Format                 string // how the archive is packed: tar, tar.gz, tar.zst, zip, oci; empty: by content
}

// incoming is an archive on its way in, from wherever: as one plain tar.
type incoming struct {
	bytes int64 // to be set aside in staging before anything is read
	// open gives the tar, and how many of bytes are taken by what it keeps in
	// staging itself. The archive's own fault is archive.ErrRefused.
	open   func(ctx context.Context) (plain io.ReadCloser, kept int64, err error)
	drain  func() error  // after a refusal: takes what is still being sent; nil: nothing is
	digest func() string // once the tar was read to its end
}

// uploaded is an upload of length bytes. Clients read the answer only after they
// have sent everything, so a refused one is received to its end all the same.
func (l *Library) uploaded(f format.Format, length int64, body io.Reader) incoming {
	raw := &hashed{r: &exactReader{r: body, want: length}, sum: sha256.New()}
	return incoming{
		bytes: length,
		open: func(ctx context.Context) (io.ReadCloser, int64, error) {
			if f == format.OCI {
				r, err := l.layout(ctx, raw, length)
				return r, length, err
			}
			s, err := format.Open(ctx, raw, format.Options{Format: f, Staging: l.o.Staging, Limits: l.formatLimits()})
			if err == nil && s.Format == format.Zip {
				return s, length, nil
			}
			return s, 0, err
		},
		drain: func() error {
			_, err := io.Copy(io.Discard, raw.r)
			return err
		},
		digest: func() string { return "sha256:" + hex.EncodeToString(raw.sum.Sum(nil)) },
	}
}

// layout reads an image layout that was uploaded, for which so many bytes are set
// aside: one that is compressed as a whole can need more.
func (l *Library) layout(ctx context.Context, r io.Reader, aside int64) (io.ReadCloser, error) {
	o := l.imageOptions("")
	o.Reserve = func(bytes int64) (func(), error) {
		ours := min(aside, bytes)
		aside -= ours
		if ours == bytes {
			return func() {}, nil
		}
		return l.reserve(bytes-ours, "image layout")
	}
	im, err := oci.OpenLayout(ctx, r, o)
	if err != nil {
		return nil, err
	}
	return imageTar{im.Tar(ctx), im}, nil
}

// imageTar is an image's tree, which takes the image with it.
type imageTar struct {
	io.ReadCloser
	image *oci.Image
}

func (t imageTar) Close() error { return errors.Join(t.ReadCloser.Close(), t.image.Close()) }

func (l *Library) formatLimits() format.Limits {
	return format.Limits{Bytes: l.o.MaxArchiveBytes, Entries: l.o.MaxEntries, Free: l.o.FreeBytes, Ratio: l.o.MaxRatio}
}

func (l *Library) imageOptions(platform string) oci.Options {
	return oci.Options{Platform: platform, Staging: l.o.Staging, Limits: oci.Limits{
		Bytes: l.o.MaxArchiveBytes, Entries: l.o.MaxEntries, Free: l.o.FreeBytes, Ratio: l.o.MaxRatio,
	}}
}

// hashed feeds a digest with what is read.
type hashed struct {
	r   io.Reader
	sum hash.Hash
}

func (h *hashed) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.sum.Write(p[:n])
	return n, err
}

// exactReader turns a body that is shorter or longer than announced into an error.
type exactReader struct {
	r          io.Reader
	want, have int64
}

func (e *exactReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.have += int64(n)
	switch {
	case e.have > e.want:
		return n, invalid("the body is longer than its Content-Length of %d bytes", e.want)
	case err == nil || errors.Is(err, io.EOF) && e.have == e.want:
		return n, err
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return n, invalid("the body ended after %d of %d bytes: the connection was cut or Content-Length is wrong", e.have, e.want)
	}
	return n, fmt.Errorf("receive the archive after %d of %d bytes: %w", e.have, e.want, err)
}

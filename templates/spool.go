package templates

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"holdfast/blockdev"
	"holdfast/internal/sys"
	"holdfast/templates/archive"
)

// spooled is an archive in staging, read through and accepted.
type spooled struct {
	file   *os.File
	counts archive.Counts
	digest string // "sha256:..."
}

// remove takes the archive out of staging.
func (s *spooled) remove() {
	_ = s.file.Close()
	_ = os.Remove(s.file.Name()) // Open empties staging anyway
}

// spool receives an archive into staging and checks it on its way. A refused
// archive is received to its end all the same (and thrown away), because
// clients read the answer only after they have sent everything.
func (l *Library) spool(ctx context.Context, id blockdev.ID, length int64, body io.Reader) (_ *spooled, err error) {
	f, err := os.OpenFile(filepath.Join(l.o.Staging, string(id)+".tar"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("staging: %w", err)
	}
	s := &spooled{file: f}
	defer func() {
		if err != nil {
			s.remove()
		}
	}()
	in := receive(ctx, f, &exactReader{r: body, want: length})
	defer in.stop()
	sum := sha256.New()
	s.counts, err = archive.Check(ctx, &hashed{r: in, sum: sum}, archive.Limits{Bytes: l.o.MaxArchiveBytes, Entries: l.o.MaxEntries})
	if errors.Is(err, archive.ErrRefused) {
		in.discard()
		if _, drained := io.Copy(io.Discard, in); drained != nil {
			return nil, l.poolError(drained) // it may have been refused because the rest did not come
		}
	}
	if err != nil {
		return nil, l.poolError(err)
	}
	s.digest = "sha256:" + hex.EncodeToString(sum.Sum(nil))
	_, err = f.Seek(0, io.SeekStart)
	return s, err
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

const (
	receiveBuffers = 4
	receiveBytes   = 1 << 20
)

// receiver reads a body and writes it to staging in the background, some buffers
// ahead of its reader.
type receiver struct {
	full, empty chan []byte
	err         error // why full was closed; io.EOF at the end of the body
	part, whole []byte
	discarding  chan struct{}
	done        chan struct{}
}

func receive(ctx context.Context, f io.Writer, body io.Reader) *receiver {
	r := &receiver{
		full: make(chan []byte, receiveBuffers), empty: make(chan []byte, receiveBuffers),
		discarding: make(chan struct{}), done: make(chan struct{}),
	}
	for range receiveBuffers {
		r.empty <- make([]byte, receiveBytes)
	}
	go func() {
		r.err = r.pump(ctx, f, body)
		close(r.full)
	}()
	return r
}

// pump fills buffers until the body ends or stop is called.
func (r *receiver) pump(ctx context.Context, f io.Writer, body io.Reader) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		var buf []byte
		select {
		case buf = <-r.empty:
		case <-r.done:
			return context.Canceled
		}
		n, err := io.ReadFull(body, buf[:receiveBytes])
		select {
		case <-r.discarding:
		default:
			if _, werr := f.Write(buf[:n]); werr != nil {
				return stagingError(werr)
			}
		}
		r.full <- buf[:n] // never blocks: there are as many buffers as places
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return io.EOF // exactReader gives these only when the length is right
		case err != nil:
			return err
		}
	}
}

func stagingError(err error) error {
	if sys.IsNoSpace(err) {
		return fmt.Errorf("%w: staging: %w", blockdev.ErrNoSpace, err)
	}
	return fmt.Errorf("staging: %w", err)
}

func (r *receiver) Read(p []byte) (int, error) {
	for len(r.part) == 0 {
		if r.whole != nil {
			r.empty <- r.whole
			r.whole = nil
		}
		buf, ok := <-r.full
		if !ok {
			return 0, r.err
		}
		r.part, r.whole = buf, buf
	}
	n := copy(p, r.part)
	r.part = r.part[n:]
	return n, nil
}

// discard stops writing to staging; what comes is still read.
func (r *receiver) discard() { close(r.discarding) }

// stop ends the background work and waits for it: it returns when the body's
// read that is under way does.
func (r *receiver) stop() {
	close(r.done)
	for range r.full {
	}
}

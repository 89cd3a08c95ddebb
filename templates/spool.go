package templates

import (
	"context"
	"errors"
	"fmt"
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
	digest string // "sha256:..." of what was uploaded
	room   *growing
}

// remove takes the archive out of staging.
func (s *spooled) remove() {
	_ = s.file.Close()
	_ = os.Remove(s.file.Name()) // Open empties staging anyway
	s.room.done()
}

// spool receives an archive into staging, as a plain tar, and checks it on its
// way. What was set aside for it is the caller's to give back, when it is removed.
func (l *Library) spool(ctx context.Context, id blockdev.ID, in incoming) (_ *spooled, err error) {
	f, err := os.OpenFile(filepath.Join(l.o.Staging, string(id)+".tar"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("staging: %w", err)
	}
	s := &spooled{file: f}
	s.room = &growing{w: f, reserve: func(bytes int64) (func(), error) { return l.reserve(bytes, "upload "+string(id)) }}
	defer func() {
		if err != nil {
			s.remove()
		}
	}()
	if s.counts, err = l.check(ctx, s.room, in); err != nil {
		if errors.Is(err, archive.ErrRefused) && in.drain != nil {
			if drained := in.drain(); drained != nil {
				return nil, l.poolError(drained) // it may have been refused because the rest did not come
			}
		}
		return nil, l.poolError(err)
	}
	s.digest = in.digest()
	_, err = f.Seek(0, io.SeekStart)
	return s, err
}

func (l *Library) check(ctx context.Context, to *growing, in incoming) (archive.Counts, error) {
	plain, kept, err := in.open(ctx)
	if sys.IsNoSpace(err) {
		err = stagingError(err)
	}
	if err != nil {
		return archive.Counts{}, err
	}
	to.left = in.bytes - kept
	r := receive(ctx, to, plain)
	counts, err := archive.Check(ctx, r, archive.Limits{Bytes: l.o.MaxArchiveBytes, Entries: l.o.MaxEntries})
	r.stop()
	return counts, errors.Join(err, plain.Close())
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
	done        chan struct{}
}

func receive(ctx context.Context, f io.Writer, body io.Reader) *receiver {
	r := &receiver{
		full: make(chan []byte, receiveBuffers), empty: make(chan []byte, receiveBuffers),
		done: make(chan struct{}),
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
		if _, werr := f.Write(buf[:n]); werr != nil {
			return stagingError(werr)
		}
		r.full <- buf[:n] // never blocks: there are as many buffers as places
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return io.EOF // a stream that is cut off ends with another error
		case err != nil:
			return err
		}
	}
}

func stagingError(err error) error {
	if errors.Is(err, ErrNoSpace) { // it could not be set aside
		return err
	}
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

// stop ends the background work and waits for it: it returns when the body's
// read that is under way does.
func (r *receiver) stop() {
	close(r.done)
	for range r.full {
	}
}

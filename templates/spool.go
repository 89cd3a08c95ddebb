package templates

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"holdfast/blockdev"
	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
	"holdfast/templates/archive"
)

// spool receives an archive, checks it on its way, and puts its contents into a
// store in staging, which done takes away again.
func (l *Library) spool(ctx context.Context, id blockdev.ID, in incoming) (_ *received, done func(), err error) {
	staged, err := l.stage(id, in.bytes)
	if err != nil {
		return nil, nil, l.poolError(err)
	}
	defer func() {
		if err != nil {
			staged.remove()
		}
	}()
	t, err := l.read(ctx, staged, in)
	if errors.Is(err, archive.ErrRefused) && in.drain != nil {
		if drained := in.drain(); drained != nil {
			err = drained // it may have been refused because the rest did not come
		}
	}
	if err != nil {
		return nil, nil, l.poolError(err)
	}
	r := receivedTree(t, staged.file)
	r.digest = in.digest()
	return r, staged.remove, nil
}

func (l *Library) read(ctx context.Context, to *staged, in incoming) (tree.Tree, error) {
	plain, kept, err := in.open(ctx)
	if err != nil {
		return tree.Tree{}, stagingError(err)
	}
	to.kept = kept
	r := receive(ctx, plain)
	t, err := archive.Read(ctx, r, archive.Limits{Bytes: l.o.MaxArchiveBytes, Entries: l.o.MaxEntries}, to)
	r.stop()
	return t, errors.Join(err, plain.Close())
}

// staged is a store in staging, and the space that is set aside for it.
type staged struct {
	*tree.Store
	file     *os.File
	reserve  func(bytes int64) (release func(), err error)
	reserved int64
	kept     int64 // by what unpacks the archive, in staging too
	release  []func()
}

// stageStep is the least that is set aside at once, in bytes.
const stageStep = 1 << 20

// stage makes a store, with so many bytes set aside.
func (l *Library) stage(id blockdev.ID, bytes int64) (*staged, error) {
	if err := l.at("stage"); err != nil {
		return nil, err
	}
	s := &staged{reserve: func(bytes int64) (func(), error) { return l.reserve(bytes, "upload "+string(id)) }}
	if err := s.room(bytes); err != nil {
		return nil, err
	}
	var err error
	if s.file, err = os.OpenFile(filepath.Join(l.o.Staging, string(id)+".store"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
		s.giveBack()
		return nil, stagingError(err)
	}
	s.Store = tree.NewStore(s.file)
	return s, nil
}

// room sets space aside: contents may be larger than what they came in, unpacked
// and rounded up to blocks.
func (s *staged) room(bytes int64) error {
	if bytes <= s.reserved {
		return nil
	}
	more := bytes - s.reserved
	if s.reserved > 0 {
		more = roundUp(max(more, s.reserved/8), stageStep)
	}
	release, err := s.reserve(more)
	if err != nil {
		return err
	}
	s.reserved += more
	s.release = append(s.release, release)
	return nil
}

// Add is the store's, within the space that is set aside.
func (s *staged) Add(ctx context.Context, r io.Reader) (*tree.Content, error) {
	if err := s.room(s.Size() + s.kept); err != nil {
		return nil, err
	}
	c, err := s.Store.Add(ctx, r)
	return c, stagingError(err)
}

// Flush is the store's.
func (s *staged) Flush() (int64, error) {
	n, err := s.Store.Flush()
	return n, stagingError(err)
}

// remove takes the store out of staging.
func (s *staged) remove() {
	s.Close()
	_ = s.file.Close()
	_ = os.Remove(s.file.Name()) // Open empties staging anyway
	s.giveBack()
}

func (s *staged) giveBack() {
	for _, release := range s.release {
		release()
	}
}

const (
	receiveBuffers = 4
	receiveBytes   = 1 << 20
)

// receiver reads a body in the background, some buffers ahead of its reader.
type receiver struct {
	full, empty chan []byte
	err         error // why full was closed; io.EOF at the end of the body
	part, whole []byte
	done        chan struct{}
}

func receive(ctx context.Context, body io.Reader) *receiver {
	r := &receiver{full: make(chan []byte, receiveBuffers), empty: make(chan []byte, receiveBuffers), done: make(chan struct{})}
	for range receiveBuffers {
		r.empty <- nil // made when it is needed
	}
	go func() {
		r.err = r.pump(ctx, body)
		close(r.full)
	}()
	return r
}

// pump fills buffers until the body ends or stop is called.
func (r *receiver) pump(ctx context.Context, body io.Reader) error {
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
		if buf == nil {
			buf = make([]byte, receiveBytes)
		}
		n, err := io.ReadFull(body, buf[:receiveBytes])
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
	switch {
	case sys.IsNoSpace(err):
		return fmt.Errorf("%w: staging: %w", blockdev.ErrNoSpace, err)
	case errors.Is(err, fs.ErrExist), errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("staging: %w", err)
	}
	return err
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

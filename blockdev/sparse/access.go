package sparse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

var _ blockdev.Accessor = (*Pool)(nil)

// Access implements blockdev.Accessor. As long as it lasts nobody else opens or
// changes the image. What of it is far away can be read until ctx ends.
func (p *Pool) Access(ctx context.Context, id blockdev.ID, readOnly bool) (blockdev.Bytes, error) {
	b, err := p.access(ctx, id, readOnly)
	if err != nil {
		return nil, blockdev.Op("sparse.Access", id, err)
	}
	return b, nil
}

func (p *Pool) access(ctx context.Context, id blockdev.ID, readOnly bool) (*accessedBytes, error) {
	if err := check(ctx, id); err != nil {
		return nil, err
	}
	done, err := p.turns.take(ctx, id)
	if err != nil {
		return nil, err
	}
	defer done()
	dir, draft, err := p.locate(id)
	if err != nil {
		return nil, err
	}
	if err := p.closedForAccess(id, dir); err != nil {
		return nil, err
	}
	b := &accessedBytes{p: p, id: id, readOnly: readOnly}
	if b.lock, err = takeLock(dir + "/" + lockFile); err != nil {
		return nil, err
	}
	if b.body, err = p.body(ctx, id, dir, draft, readOnly); err != nil {
		dropLock(b.lock)
		return nil, err
	}
	p.mu.Lock()
	p.accessed[id]++
	p.mu.Unlock()
	return b, nil
}

func (p *Pool) closedForAccess(id blockdev.ID, dir string) error {
	if p.isAccessed(id) || p.known(id) != nil {
		return blockdev.ErrBusy
	}
	if found, err := p.foreignDevice(id, dir); err != nil || found != nil {
		return errors.Join(err, blockdev.ErrBusy)
	}
	return nil
}

func (p *Pool) isAccessed(id blockdev.ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accessed[id] > 0
}

// body is what Access gives the bytes of.
type body interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Sync() error
	Size() int64
	Close() error
}

func (p *Pool) body(ctx context.Context, id blockdev.ID, dir string, draft, readOnly bool) (body, error) {
	c, err := readChain(id, dir)
	if err != nil {
		return nil, err
	}
	if err := p.sweep(dir, c); err != nil {
		return nil, err
	}
	switch {
	case c != nil && !readOnly && sealedForEver(id, draft):
		return nil, fmt.Errorf("%w: a snapshot is never written", blockdev.ErrInvalid)
	case c != nil:
		if !readOnly {
			p.forgetDescent(id)
		}
		if err := p.recoverClosed(id, dir, draft, c); err != nil {
			return nil, err
		}
		return p.assemble(ctx, dir, c, readOnly, nil)
	}
	if err := writable(id, dir, draft, readOnly); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir+"/"+imageFile, accessMode(readOnly), 0)
	if err != nil {
		return nil, notFound(err)
	}
	status, err := sys.StatusOf(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return flatBody{f, status.Size}, nil
}

// flatBody is a plain file that does not grow.
type flatBody struct {
	*os.File
	size int64
}

func (b flatBody) Size() int64 { return b.size }

func (b flatBody) Sync() error { return syncFile(b.File) }

func (b flatBody) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > b.size-int64(len(p)) {
		return 0, fmt.Errorf("%w: %d bytes at %d of an image of %d", blockdev.ErrInvalid, len(p), off, b.size)
	}
	n, err := b.File.WriteAt(p, off)
	return n, noSpace(err)
}

// accessedBytes are the bytes of an image that this process works on.
type accessedBytes struct {
	body
	p        *Pool
	id       blockdev.ID
	readOnly bool
	lock     *os.File
	closing  sync.Mutex
}

// ReadAt implements io.ReaderAt.
func (b *accessedBytes) ReadAt(p []byte, off int64) (int, error) {
	size := b.body.Size()
	if off < 0 || off >= size {
		return 0, io.EOF
	}
	if rest := size - off; int64(len(p)) > rest {
		n, err := b.body.ReadAt(p[:rest], off)
		if err == nil {
			err = io.EOF
		}
		return n, err
	}
	return b.body.ReadAt(p, off)
}

// WriteAt implements io.WriterAt.
func (b *accessedBytes) WriteAt(p []byte, off int64) (int, error) {
	if b.readOnly {
		return 0, fmt.Errorf("%w: opened read-only", blockdev.ErrInvalid)
	}
	return b.body.WriteAt(p, off)
}

// Sync implements blockdev.Bytes.
func (b *accessedBytes) Sync() error {
	if b.readOnly {
		return nil
	}
	return b.body.Sync()
}

// Close implements io.Closer. What was written and not synced may be lost.
func (b *accessedBytes) Close() error {
	b.closing.Lock()
	defer b.closing.Unlock()
	if b.lock == nil {
		return fs.ErrClosed
	}
	err := b.body.Close()
	dropLock(b.lock)
	b.lock = nil
	b.p.mu.Lock()
	delete(b.p.accessed, b.id)
	b.p.mu.Unlock()
	b.p.wakeBackground()
	return err
}

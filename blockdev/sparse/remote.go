package sparse

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

// maxChunks bounds what is taken for the chunks of a base, in bytes: 1 TiB in chunks of
// 64 KiB, and more in larger ones.
const maxChunks = 512<<20 + 4096

var _ blockdev.RemoteCreator = (*Pool)(nil)

// HoldsRemote implements blockdev.RemoteCreator: where there are workers.
func (p *Pool) HoldsRemote() bool { return p.layers }

// RemoteBaseOf implements blockdev.RemoteCreator.
func (p *Pool) RemoteBaseOf(ctx context.Context, id blockdev.ID) (blockdev.RemoteBase, io.Closer, error) {
	base, chunks, err := p.remoteBaseOf(ctx, id)
	return base, chunks, blockdev.Op("sparse.RemoteBaseOf", id, err)
}

func (p *Pool) remoteBaseOf(ctx context.Context, id blockdev.ID) (base blockdev.RemoteBase, chunks io.Closer, err error) {
	if err := check(ctx, id); err != nil {
		return base, nil, err
	}
	dir, _, err := p.locate(id)
	if err != nil {
		return base, nil, err
	}
	c, err := readChain(id, dir)
	if err != nil {
		return base, nil, err
	}
	if c == nil || !c.far() {
		return base, nil, fmt.Errorf("%w: its base is not far away", blockdev.ErrInvalid)
	}
	f, err := os.Open(dir + "/" + c.Base)
	if err != nil {
		return base, nil, unexplained(c.Base, err)
	}
	base = blockdev.RemoteBase{URL: p.urlOf(c), Chunks: f, AddressOf: c.follows(), Moved: p.addresses.now(c.follows()).Digest == c.Digest}
	_, _ = hex.Decode(base.Digest[:], []byte(c.Digest)) // it was checked
	return base, f, nil
}

// CreateRemote implements blockdev.RemoteCreator. The image has the base's size, up to
// whole blocks. blockdev.ErrInvalid for an address that is none.
func (p *Pool) CreateRemote(ctx context.Context, id blockdev.ID, base blockdev.RemoteBase) error {
	return blockdev.Op("sparse.CreateRemote", id, p.createRemote(ctx, id, base))
}

func (p *Pool) createRemote(ctx context.Context, id blockdev.ID, base blockdev.RemoteBase) error {
	if !p.layers {
		return fmt.Errorf("the pool has no workers: %w", errors.ErrUnsupported)
	}
	if err := overlay.CheckURL(base.URL); err != nil {
		return err
	}
	if err := p.roomForDraft(ctx, id, sector); err != nil { // its size comes with the chunks
		return err
	}
	return p.madeDraft(id, func(dir string) error {
		c := &chain{Base: newPart("chunks"), URL: base.URL, Digest: hex.EncodeToString(base.Digest[:]), Origin: id, AddressOf: base.AddressOf}
		if err := copyChunks(ctx, dir+"/"+c.Base, base); err != nil {
			return err
		}
		chunks, err := p.chunksOf(dir, c)
		if err != nil {
			return err
		}
		c.BaseSize = chunks.Size
		if err := p.at("draft.layer"); err != nil {
			return err
		}
		top := newPart("layer")
		if err := newLayer(dir, top, wholeBlocks(chunks.Size)); err != nil {
			return err
		}
		if err := p.at("draft.chain"); err != nil {
			return err
		}
		return p.renameChain(id, dir, c.with(top))
	})
}

// wholeBlocks rounds a size up to blocks of a layer.
func wholeBlocks(size int64) int64 {
	return (size + overlay.BlockSize - 1) / overlay.BlockSize * overlay.BlockSize
}

// copyChunks makes a file of what a base consists of, flushed.
func copyChunks(ctx context.Context, path string, base blockdev.RemoteBase) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return noSpace(err)
	}
	n, err := io.Copy(f, io.LimitReader(untilEnd{ctx, base.Chunks}, maxChunks+1))
	if err == nil && n > maxChunks {
		err = fmt.Errorf("%w: the chunks take more than %d bytes: the base is to be digested in larger ones", blockdev.ErrInvalid, maxChunks)
	}
	if err == nil {
		err = syncFile(f)
	}
	return noSpace(errors.Join(err, f.Close()))
}

// untilEnd is a reader that ends with a context.
type untilEnd struct {
	ctx context.Context //nolint:containedctx // of one call
	r   io.Reader
}

func (u untilEnd) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

// chunkFiles are files of chunks that were verified, by their digests: who has the same
// base has the same file.
type chunkFiles struct {
	mu      sync.Mutex
	seen    map[string]seenChunks
	reading map[string]chan struct{} // those that are being verified; closed when that is done
}

// seenChunks is one as it was.
type seenChunks struct {
	file   os.FileInfo
	chunks overlay.Chunks
}

func (s seenChunks) is(file os.FileInfo) bool {
	return s.file != nil && os.SameFile(s.file, file) && s.file.Size() == file.Size() && s.file.ModTime().Equal(file.ModTime())
}

// maxSeen bounds how many are remembered.
const maxSeen = 256

// chunksOf tells what the base of a chain that is far away consists of, for who asks often
// and reads nothing of it: a file that is as it was is not read again.
// blockdev.ErrCorrupt for one that is not what the chain names.
func (p *Pool) chunksOf(dir string, c *chain) (overlay.Chunks, error) {
	f, err := os.Open(dir + "/" + c.Base)
	if err != nil {
		return overlay.Chunks{}, unexplained(c.Base, err)
	}
	defer f.Close()
	file, err := f.Stat()
	if err != nil {
		return overlay.Chunks{}, err
	}
	chunks, known, done := p.chunks.find(c.Digest, file)
	if known {
		return chunks, c.checkSize(chunks)
	}
	chunks, err = verifyChunks(f, c)
	done(seenChunks{file, chunks}, err)
	return chunks, err
}

// find gives what a file of chunks holds that was verified; else the caller is to verify
// it and say so by done: who wants the same waits for that, who wants another does not.
func (k *chunkFiles) find(digest string, file os.FileInfo) (c overlay.Chunks, known bool, done func(seenChunks, error)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		if seen := k.seen[digest]; seen.is(file) {
			return seen.chunks, true, nil
		}
		reading := k.reading[digest]
		if reading == nil {
			break
		}
		k.mu.Unlock()
		<-reading
		k.mu.Lock()
	}
	if k.seen == nil || len(k.seen) >= maxSeen {
		k.seen = map[string]seenChunks{}
	}
	if k.reading == nil {
		k.reading = map[string]chan struct{}{}
	}
	reading := make(chan struct{})
	k.reading[digest] = reading
	return c, false, func(s seenChunks, err error) {
		k.mu.Lock()
		defer k.mu.Unlock()
		if err == nil {
			k.seen[digest] = s
		}
		delete(k.reading, digest)
		close(reading)
	}
}

// verifyChunks reads all of a file of chunks and makes sure that it is the one that a
// chain names.
func verifyChunks(f *os.File, c *chain) (overlay.Chunks, error) {
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, 0, maxChunks+1)); err != nil {
		return overlay.Chunks{}, err
	}
	if hex.EncodeToString(sum.Sum(nil)) != c.Digest {
		return overlay.Chunks{}, fmt.Errorf("%w: the chunks of its base are not those that it was made of", blockdev.ErrCorrupt)
	}
	chunks, err := overlay.ReadChunks(f)
	if err != nil {
		return overlay.Chunks{}, err
	}
	return chunks, c.checkSize(chunks)
}

// absentFar tells how many bytes a top layer lacks of a base that is far away, at most.
func (p *Pool) absentFar(dir string, c *chain, top overlay.Files) (int64, error) {
	chunks, err := p.chunksOf(dir, c)
	if err != nil {
		return 0, err
	}
	return chunks.Absent(top.Map)
}

// checkSize makes sure that chunks are of a base of the chain's size; one in the making
// has none.
func (c *chain) checkSize(chunks overlay.Chunks) error {
	if c.BaseSize != 0 && chunks.Size != c.BaseSize {
		return fmt.Errorf("%w: the chunks are of a base of %d bytes, not %d", blockdev.ErrCorrupt, chunks.Size, c.BaseSize)
	}
	return nil
}

// far reports whether the chain's base is far away.
func (c *chain) far() bool { return c.URL != "" }

// farBase is a base that this process fetches.
type farBase struct {
	*overlay.Remote
	ctx    context.Context //nolint:containedctx // readers wait until it ends
	cancel context.CancelCauseFunc
	client *http.Client
	url    func() string
	end    func() error
}

// openFar opens the base of a chain that is far away, until it is closed or ctx ends:
// then whoever waits for it gets an error.
func (p *Pool) openFar(ctx context.Context, dir string, c *chain) (*farBase, error) {
	f, err := os.Open(dir + "/" + c.Base)
	if err != nil {
		return nil, unexplained(c.Base, err)
	}
	chunks, err := verifyChunks(f, c)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	b := &farBase{client: overlay.StoreClient(nil, nil, p.prefixes.Allow), url: func() string { return p.urlOf(c) }}
	b.Remote, err = overlay.NewRemote(chunks, overlay.HTTPFetchFrom(b.client, b.url), overlay.RemoteOptions{})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	b.ctx, b.cancel = context.WithCancelCause(ctx)
	context.AfterFunc(b.ctx, b.Remote.Close)
	p.addresses.opened(b, c.follows())
	b.end = func() error {
		b.cancel(nil)
		b.Remote.Close()
		p.addresses.closed(b)
		b.client.CloseIdleConnections()
		return f.Close()
	}
	return b, nil
}

// giveUp ends the base, as if its context had ended, when its store has failed for so long
// that who asks has better things to do.
func (b *farBase) giveUp(after time.Duration) {
	tick := time.NewTicker(after / 10)
	defer tick.Stop()
	for {
		select {
		case <-b.ctx.Done():
			return
		case <-tick.C:
		}
		if s := b.Status(); !s.Failing.IsZero() && time.Since(s.Failing) >= after {
			b.cancel(errGivenUp)
			return
		}
	}
}

// errGivenUp is why a base was not asked any longer.
var errGivenUp = errors.New("it is asked again later")

// ReadAt implements overlay.Source.
func (b *farBase) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.Remote.ReadAt(p, off)
	if err != nil && b.ctx.Err() != nil {
		err = b.explained(context.Cause(b.ctx))
	}
	return n, err
}

// explained adds to why somebody does not wait any longer what the store has done. That is
// told as words: it is no damage of the image.
func (b *farBase) explained(why error) error {
	s := b.Status()
	switch {
	case errors.Is(why, blockdev.ErrUnreachable):
		return why
	case s.Err != nil:
		return fmt.Errorf("%w: %s: %s, after %d tries since %s (%w)", blockdev.ErrUnreachable, overlay.StoreName(b.url()), s.Err.Error(), s.Tries, s.Failing.UTC().Format(time.RFC3339), why)
	case errors.Is(why, context.DeadlineExceeded):
		return fmt.Errorf("%w: %s is silent (%w)", blockdev.ErrUnreachable, overlay.StoreName(b.url()), why)
	}
	return why
}

// Close ends it; whoever waits gets an error.
func (b *farBase) Close() error { return b.end() }

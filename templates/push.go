package templates

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"holdfast/blockdev"
	"holdfast/blockdev/tree"
	"holdfast/templates/archive"
	"holdfast/templates/delta"
)

// knownRevisions is how many of a template's revisions, the newest ones, are
// looked at for chunks that need not be sent again.
const knownRevisions = 4

// Known says what the newest revisions of the template that an upload URL is for
// have of a tree. Of other templates and other workspaces nothing is told. Nothing
// is kept for the upload that may follow. ErrUploadGone, ErrInvalid; ErrBusy when
// too many ask.
func (l *Library) Known(ctx context.Context, u Upload, query io.Reader) (delta.Answer, error) {
	key, err := l.uploadTo(u)
	if err != nil {
		return delta.Answer{}, err
	}
	q, err := delta.DecodeQuery(query, l.o.MaxEntries+l.o.MaxArchiveBytes/tree.Chunk)
	if errors.Is(err, delta.ErrMalformed) {
		err = invalid("%w", err)
	}
	if err != nil {
		return delta.Answer{}, err
	}
	if _, found := l.sameTree(key, q.Identity); found {
		return delta.Answer{Same: true}, nil
	}
	select {
	case l.uploads <- struct{}{}: // it holds a tree in memory
		defer func() { <-l.uploads }()
	default:
		return delta.Answer{}, ErrBusy
	}
	marks := map[delta.Mark]bool{}
	for _, v := range l.newestReady(key) {
		if err := l.markChunks(ctx, v, marks); err != nil {
			return delta.Answer{}, err
		}
	}
	a := delta.Answer{Known: delta.NewBits(len(q.Marks))}
	for i, m := range q.Marks {
		if marks[m] {
			a.Known.Set(i)
		}
	}
	return a, nil
}

func (l *Library) markChunks(ctx context.Context, v Revision, marks map[delta.Mark]bool) error {
	v, err := l.pin(v.ID)
	if err != nil {
		return nil // it was deleted this moment: then it has nothing
	}
	defer l.unpin(v.ID)
	source, release, err := l.openManifest(ctx, v)
	if err != nil {
		return err
	}
	defer release()
	for n, err := range source() {
		if err != nil {
			return err
		}
		for _, d := range n.Digests {
			marks[delta.MarkOf(d)] = true
		}
	}
	return ctx.Err()
}

// uploadTo is the template that an upload URL is for, if it still can be used.
func (l *Library) uploadTo(u Upload) (key string, err error) {
	if err := l.checkURL(u.ID, u.Expires, u.Signature); err != nil {
		return "", err
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	key, known := l.revisions[blockdev.ID(u.ID)]
	if !known || l.records[key].revision(blockdev.ID(u.ID)).Status != Created {
		return "", fmt.Errorf("%w: it was used already, or its version was deleted", ErrUploadGone)
	}
	return key, nil
}

// newestReady gives READY revisions of a template whose bytes are here, the newest first.
func (l *Library) newestReady(key string) []Revision {
	r := l.lookup(key)
	if r == nil {
		return nil
	}
	var newest []Revision
	for i := len(r.Template.Revisions) - 1; i >= 0 && len(newest) < knownRevisions; i-- {
		if v := r.Template.Revisions[i]; v.Status == Ready && v.Remote == nil {
			newest = append(newest, v)
		}
	}
	return newest
}

// sameTree finds a READY revision of a template that holds just a tree.
func (l *Library) sameTree(key, identity string) (Revision, bool) {
	r := l.lookup(key)
	if r == nil || identity == "" {
		return Revision{}, false
	}
	v := r.Template.newestOf(func(v Revision) bool { return v.Status == Ready && v.TreeDigest == identity })
	if v == nil {
		return Revision{}, false
	}
	return *v, true
}

// IngestDelta is Ingest for what package delta says: a tree with those of its
// chunks that the template's newest revisions do not have. It is made into the
// archive that the tree stands for, and that is ingested like one that was sent:
// every rule for archives holds. A chunk counts only with the digest that the tree
// says, wherever it comes from. The revisions that are read stay meanwhile.
//
// ErrChunks when a chunk is neither sent nor there any more: the URL can be used
// again, with another delta or a plain archive; so it is after ErrInvalid, for what
// is not a delta. Other errors as Ingest.
func (l *Library) IngestDelta(ctx context.Context, u Upload, length int64, body io.Reader) (Revision, error) {
	key, err := l.uploadTo(u)
	switch {
	case err != nil:
		return Revision{}, err
	case length < 0:
		return Revision{}, invalid("Content-Length is required")
	case length > l.o.MaxArchiveBytes:
		return Revision{}, invalid("a body of %d bytes: the most is %d", length, l.o.MaxArchiveBytes)
	}
	d := &incomingDelta{l: l, key: key, body: &exactReader{r: body, want: length}}
	defer d.release()
	v, err := l.receiveBy(ctx, blockdev.ID(u.ID), func(string) (Revision, error) { return d.become(ctx, blockdev.ID(u.ID)) })
	if err != nil {
		_ = d.drain() // clients read the answer only after they have sent everything
	}
	if errors.Is(err, delta.ErrMalformed) {
		err = invalid("%w", err)
	}
	return v, err
}

// incomingDelta is a delta on its way to be an archive.
type incomingDelta struct {
	l    *Library
	key  string
	body *exactReader
	from []*openRevision
	at   map[tree.Digest]chunkPlace
	sum  hash.Hash
	r    *io.PipeReader
	done chan struct{} // closed when the archive was written
}

// chunkPlace says where a chunk is: in which of the revisions, and where in its
// image.
type chunkPlace struct {
	base   int
	length int
	runs   []tree.Run // with offsets in the chunk
}

func (d *incomingDelta) release() {
	if d.done != nil {
		_ = d.r.Close() // always nil
		<-d.done
	}
	for _, o := range d.from {
		o.release()
	}
}

func (d *incomingDelta) drain() error {
	if d.done != nil {
		_ = d.r.Close() // always nil
		<-d.done        // it reads the body
	}
	_, err := io.Copy(io.Discard, d.body)
	return err
}

func (d *incomingDelta) digest() string { return "sha256:" + hex.EncodeToString(d.sum.Sum(nil)) }

// become makes the revision of what the delta says.
func (d *incomingDelta) become(ctx context.Context, id blockdev.ID) (Revision, error) {
	in, err := delta.Receive(d.body, delta.Limits{Bytes: d.l.o.MaxArchiveBytes, Entries: d.l.o.MaxEntries})
	if err != nil {
		return Revision{}, err
	}
	if in.Same != "" {
		if err := in.End(); err != nil {
			return Revision{}, err
		}
		return d.same(ctx, id, in.Same)
	}
	r, done, err := d.l.spool(ctx, id, incoming{
		bytes: d.body.want, drain: d.drain, digest: d.digest,
		open: func(ctx context.Context) (io.ReadCloser, int64, error) {
			r, err := d.archive(ctx, in)
			return r, 0, err
		},
	})
	if err != nil {
		return Revision{}, err
	}
	defer done()
	if r.identity != in.Tree.Identity() {
		return Revision{}, fmt.Errorf("%w: its tree is not one that an archive can hold", delta.ErrMalformed)
	}
	return d.l.become(ctx, d.key, id, r)
}

// archive gives the archive of the tree that came.
func (d *incomingDelta) archive(ctx context.Context, in *delta.Received) (io.ReadCloser, error) {
	source := in.Tree.Source()
	switch size, err := archive.Length(ctx, source); {
	case err != nil:
		return nil, err
	case size > d.l.o.MaxArchiveBytes:
		return nil, invalid("an archive of %d bytes: the most is %d", size, d.l.o.MaxArchiveBytes)
	}
	if err := d.find(ctx, in.Missing()); err != nil {
		return nil, err
	}
	in.From(d.read)
	r, w := io.Pipe()
	d.r, d.done, d.sum = r, make(chan struct{}), sha256.New()
	go func() {
		defer close(d.done)
		out := bufio.NewWriterSize(w, archiveBuffer)
		err := archive.Write(ctx, out, source, in)
		if err == nil {
			err = in.End()
		}
		if err == nil {
			err = out.Flush()
		}
		_ = w.CloseWithError(err) // always nil
	}()
	return hashedPipe{&hashed{r: r, sum: d.sum}, r}, nil
}

// hashedPipe is an archive that is digested as it is read.
type hashedPipe struct {
	io.Reader
	io.Closer
}

// same makes a revision of the image of one that holds a tree.
func (d *incomingDelta) same(ctx context.Context, id blockdev.ID, identity string) (Revision, error) {
	v, found := d.l.sameTree(d.key, identity)
	if !found {
		return Revision{}, fmt.Errorf("%w: no version holds this tree any more", ErrChunks)
	}
	v, err := d.l.pinGood(ctx, v.ID)
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w: %w", ErrChunks, err)
	}
	if err != nil {
		return Revision{}, err
	}
	defer d.l.unpin(v.ID)
	if err := d.l.copyRevision(ctx, id, v); err != nil {
		return Revision{}, errors.Join(d.l.poolError(err), d.l.abandon(ctx, id))
	}
	return d.l.finish(context.WithoutCancel(ctx), d.key, id, v)
}

// find opens the newest revisions of the template until all that is missing was
// found. ErrChunks when it was not.
func (d *incomingDelta) find(ctx context.Context, missing []delta.Chunk) error {
	wanted := make(map[tree.Digest]bool, len(missing))
	for _, c := range missing {
		wanted[c.Digest()] = true
	}
	d.at = make(map[tree.Digest]chunkPlace, len(wanted))
	for _, v := range d.l.newestReady(d.key) {
		if len(d.at) == len(wanted) {
			return nil
		}
		o, err := d.l.openContents(ctx, v.ID)
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrDamaged) {
			continue // deleted, or found damaged, this moment
		}
		if err != nil {
			return err
		}
		d.from = append(d.from, o)
		if err := d.findIn(o, wanted); err != nil {
			return err
		}
	}
	if lacking := len(wanted) - len(d.at); lacking > 0 {
		return fmt.Errorf("%w: %d of %d", ErrChunks, lacking, len(wanted))
	}
	return nil
}

// findIn notes where the last revision has chunks that are wanted and not found yet.
func (d *incomingDelta) findIn(o *openRevision, wanted map[tree.Digest]bool) error {
	for n, err := range o.tree() {
		if err != nil {
			return err
		}
		for k, digest := range n.Digests {
			if _, found := d.at[digest]; wanted[digest] && !found {
				begin := int64(k) * tree.Chunk
				length := min(tree.Chunk, n.Size-begin)
				d.at[digest] = chunkPlace{len(d.from) - 1, int(length), runsWithin(n.Runs, begin, length)}
			}
		}
	}
	return nil
}

// read gives a chunk that find found. One that is damaged there is to be sent, and
// its revision to be verified.
func (d *incomingDelta) read(_ context.Context, digest tree.Digest, buf []byte) error {
	at := d.at[digest]
	if len(buf) != at.length {
		return fmt.Errorf("%w: %w: a chunk of another length", delta.ErrMalformed, delta.ErrDigest)
	}
	o := d.from[at.base]
	err := readRuns(o.image, at.runs, buf)
	if err == nil && tree.DigestOf(buf) != digest {
		err = fmt.Errorf("%w: a chunk in version %s:%s", blockdev.ErrCorrupt, o.Template, o.Name)
	}
	if errors.Is(err, blockdev.ErrCorrupt) || damageOf(err) != "" {
		d.l.suspectOn(err, o.ID)
		return fmt.Errorf("%w: %w", ErrChunks, err)
	}
	return err
}

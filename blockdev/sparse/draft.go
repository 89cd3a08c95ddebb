package sparse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"holdfast/blockdev"
	"holdfast/blockdev/envelope"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// Create implements blockdev.Backend. The image is one hole: it takes no space.
func (p *Pool) Create(ctx context.Context, id blockdev.ID, size int64) error {
	return blockdev.Op("sparse.Create", id, p.create(ctx, id, size, nil))
}

// Clone implements blockdev.Cloner: by reflink, in a time that grows with the number
// of extents of src, not with its size. A layered src, and where the pool has no
// reflink any image that is never written, becomes the base of a layered draft.
func (p *Pool) Clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	return blockdev.Op("sparse.Clone", dst, p.clone(ctx, dst, src, size))
}

func (p *Pool) clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	if err := check(ctx, dst, src); err != nil {
		return err
	}
	done, err := p.turns.take(ctx, src)
	if err != nil {
		return err
	}
	defer done()
	c, err := readChain(src, p.image(src))
	if err != nil {
		return err
	}
	if c != nil {
		return p.cloneChain(ctx, dst, src, c, size)
	}
	from, err := os.Open(p.image(src) + "/" + imageFile)
	if err != nil {
		return fmt.Errorf("source %s: %w", src, notFound(err))
	}
	defer from.Close()
	status, err := sys.StatusOf(from)
	if err != nil {
		return err
	}
	if err := largeEnough(src, status.Size, size); err != nil {
		return err
	}
	if p.reflinks || !p.layers || !immutable(src) || size%overlay.BlockSize != 0 {
		return p.create(ctx, dst, size, from)
	}
	if err := p.roomForDraft(ctx, dst, size); err != nil {
		return err
	}
	return p.cloneLayered(dst, size, p.image(src), imageFile, &chain{Base: newPart("base"), BaseSize: status.Size, Origin: src})
}

func largeEnough(src blockdev.ID, has, size int64) error {
	if size < has {
		return fmt.Errorf("size %d is smaller than the %d of %s: %w", size, has, src, blockdev.ErrInvalid)
	}
	return nil
}

// cloneChain clones a layered image. A snapshot's layers are shared as they are, a
// volume is sealed first.
func (p *Pool) cloneChain(ctx context.Context, dst, src blockdev.ID, c *chain, size int64) error {
	s, err := p.survey(ctx, src)
	if err != nil {
		return err
	}
	if err := errors.Join(largeEnough(src, s.size, size), checkSize(size)); err != nil {
		return err
	}
	if err := p.roomForDraft(ctx, dst, size); err != nil {
		return err
	}
	below := p.sealedBefore(s)
	switch {
	case immutable(src) && below != nil: // its top has nothing
		c = below
	case !immutable(src) || c.far() && !sealedForEver(src, false):
		// One whose base is far away may be made flat while others read what it is made of:
		// then its top is to be its own.
		if !p.sealable(s) {
			return errors.ErrUnsupported
		}
		if c, _, err = p.seal(ctx, s); err != nil {
			return err
		}
	}
	return p.cloneLayered(dst, size, s.dir, c.Base, c)
}

// create makes a draft, from the bytes of another file if there is one.
func (p *Pool) create(ctx context.Context, id blockdev.ID, size int64, from *os.File) error {
	if err := p.roomForDraft(ctx, id, size); err != nil {
		return err
	}
	err := p.fillDraft(id, size, from)
	if err != nil {
		err = errors.Join(err, p.discard(p.draft(id)))
	}
	return err
}

// roomForDraft checks what is asked and makes way for a draft.
func (p *Pool) roomForDraft(ctx context.Context, id blockdev.ID, size int64) error {
	if err := errors.Join(check(ctx, id), checkSize(size)); err != nil {
		return err
	}
	if there, err := exists(p.image(id)); err != nil || there {
		return errors.Join(err, blockdev.ErrExists)
	}
	return p.dropDraft(ctx, id)
}

func (p *Pool) fillDraft(id blockdev.ID, size int64, from *os.File) error {
	if err := os.Mkdir(p.draft(id), 0o700); err != nil {
		return noSpace(err)
	}
	if err := p.at("create.image"); err != nil {
		return err
	}
	f, err := os.OpenFile(p.draft(id)+"/"+imageFile, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return noSpace(err)
	}
	defer f.Close()
	if from != nil {
		if err := sys.CloneFile(f, from); err != nil {
			if sys.IsNoReflink(err) {
				return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
			}
			return noSpace(err)
		}
		if err := p.at("create.size"); err != nil {
			return err
		}
	}
	return tooLarge(f.Truncate(size))
}

// dropDraft makes way for a draft: what is left of an older one goes.
// blockdev.ErrBusy while that is open.
func (p *Pool) dropDraft(ctx context.Context, id blockdev.ID) error {
	if there, err := exists(p.draft(id)); err != nil || !there {
		return err
	}
	if err := p.closedForRemoval(ctx, id, p.draft(id), true); err != nil {
		return err
	}
	return p.discard(p.draft(id))
}

// discard moves a directory to the trash, whose worker then deletes it. Not
// durable.
func (p *Pool) discard(dir string) error {
	there, err := exists(dir)
	if err != nil || !there {
		return err
	}
	if err := os.Rename(dir, p.path(trashDir, unique(filepath.Base(dir)))); err != nil {
		return noSpace(err)
	}
	p.wakeReclaim()
	return nil
}

// Publish implements blockdev.Backend. The package comment says what is flushed
// when, and why.
func (p *Pool) Publish(ctx context.Context, id blockdev.ID, description []byte) error {
	return blockdev.Op("sparse.Publish", id, p.publish(ctx, id, description))
}

func (p *Pool) publish(ctx context.Context, id blockdev.ID, description []byte) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	there, err := exists(p.image(id))
	if err != nil {
		return err
	}
	if there { // perhaps by us, before a crash that came before the last flush
		err := p.replaceEnvelope(p.image(id), descriptionFile, string(id), description)
		return errors.Join(err, syncDir(p.path(imagesDir)))
	}
	err = p.flushDraft(id, description)
	if errors.Is(err, blockdev.ErrFailed) {
		// A second flush of this draft could succeed without its data: it goes.
		err = errors.Join(err, p.discard(p.draft(id)))
	}
	if err != nil {
		return err
	}
	if err := p.at("publish.rename"); err != nil {
		return err
	}
	if err := sys.RenameNew(p.draft(id), p.image(id)); err != nil {
		return noSpace(err)
	}
	if err := p.at("publish.flush"); err != nil {
		return err
	}
	if err := syncDir(p.path(imagesDir)); err != nil {
		return err
	}
	p.wakeBackground()
	return syncDir(p.path(draftsDir))
}

// flushDraft makes a draft's bytes, its description and its directory durable.
func (p *Pool) flushDraft(id blockdev.ID, description []byte) error {
	sealed, err := envelope.Seal(string(id), description)
	if err != nil {
		return err
	}
	bytes, err := p.draftFiles(id)
	defer closeAll(bytes)
	if err != nil {
		return err
	}
	if err := p.at("publish.description"); err != nil {
		return err
	}
	described, err := os.OpenFile(p.draft(id)+"/"+descriptionFile, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return noSpace(err)
	}
	defer described.Close()
	if _, err := described.Write(sealed); err != nil {
		return noSpace(err)
	}
	if o := p.known(id); o.looped() {
		if err := o.device.Flush(); err != nil && !errors.Is(err, blockdev.ErrNotFound) {
			return err
		}
	}
	for _, flush := range []func(*os.File) error{sys.StartWriteback, syncFile} { // the writing overlaps
		for _, f := range append(bytes, described) {
			if err := flush(f); err != nil {
				return err
			}
		}
	}
	return syncDir(p.draft(id))
}

// draftFiles opens what of a draft may have been written: its file or its top layer.
// What lies below that is another image's, and durable.
func (p *Pool) draftFiles(id blockdev.ID) (files []*os.File, err error) {
	c, err := readChain(id, p.draft(id))
	if err != nil {
		return nil, err
	}
	names := []string{imageFile}
	if c != nil {
		names = []string{c.Layers[0] + dataSuffix, c.Layers[0] + mapSuffix}
	}
	for _, name := range names {
		f, err := os.OpenFile(p.draft(id)+"/"+name, os.O_RDWR, 0)
		if err != nil {
			return files, notFound(err)
		}
		files = append(files, f)
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

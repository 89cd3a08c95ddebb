package sparse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// shareExtents is up to how many extents a reflink copy is quicker than a new layer:
// it takes some 20 to 30 µs for each, while writers wait. Nobody waits for a closed
// image, and whoever needs a file of one that got a new layer waits for a copy of all
// of it.
const (
	shareExtents       = 128
	shareExtentsClosed = 4096
)

var _ blockdev.Snapshotter = (*Pool)(nil)

// Snapshot implements blockdev.Snapshotter: by reflink where the pool can and the
// image has few extents, else by a new layer, in a time that does not grow with the
// image.
func (p *Pool) Snapshot(ctx context.Context, snap, of blockdev.ID) (held time.Duration, err error) {
	held, err = p.snapshot(ctx, snap, of)
	return held, blockdev.Op("sparse.Snapshot", snap, err)
}

func (p *Pool) snapshot(ctx context.Context, snap, of blockdev.ID) (held time.Duration, err error) {
	if err := check(ctx, snap, of); err != nil {
		return 0, err
	}
	done, err := p.turns.take(ctx, of)
	if err != nil {
		return 0, err
	}
	defer done()
	if there, err := exists(p.image(of)); err != nil || !there {
		return 0, errors.Join(err, fmt.Errorf("source %s: %w", of, blockdev.ErrNotFound))
	}
	if there, err := exists(p.image(snap)); err != nil || there {
		return 0, errors.Join(err, blockdev.ErrExists)
	}
	if err := p.dropDraft(ctx, snap); err != nil {
		return 0, err
	}
	s, err := p.survey(ctx, of)
	if err != nil {
		return 0, err
	}
	share, err := p.sharesFaster(s)
	if err != nil {
		return 0, err
	}
	if share {
		return p.shareWhole(ctx, snap, of)
	}
	sealed, held, err := p.seal(ctx, s)
	if err != nil {
		return 0, err
	}
	return held, p.madeDraft(snap, func(dir string) error { return p.linkSealed(snap, dir, s, sealed) })
}

// subject is an image that is to be sealed.
type subject struct {
	id      blockdev.ID
	dir     string
	chain   *chain // nil: flat
	size    int64
	opening *opening
}

func (p *Pool) survey(ctx context.Context, id blockdev.ID) (subject, error) {
	s := subject{id: id, dir: p.image(id)}
	if p.isAccessed(id) {
		return s, fmt.Errorf("this process works on it: %w", blockdev.ErrBusy)
	}
	var err error
	if p.known(id).served() { // a layer that its worker waits for is not to be swept away
		if _, err = p.worker(ctx, id); err != nil && !errors.Is(err, blockdev.ErrNotFound) {
			return s, err
		}
	}
	if s.chain, err = readChain(id, s.dir); err != nil {
		return s, err
	}
	err = p.sweep(s.dir, s.chain)
	if err == nil && p.known(id) == nil {
		err = p.recoverClosed(id, s.dir, false, s.chain)
	}
	if err != nil {
		return s, err
	}
	info := blockdev.Info{}
	if s.chain != nil {
		info.ID = id
		err = p.inspectLayers(&info, s.dir, s.chain, nil)
		s.size = info.Size
	} else {
		var status sys.FileStatus
		status, err = sys.StatusAt(s.dir + "/" + imageFile)
		s.size = status.Size
	}
	if err != nil {
		return s, unexplained("image", err)
	}
	s.opening = p.known(id)
	if s.opening == nil && s.chain == nil {
		s.opening, err = p.foreignDevice(id, s.dir)
	}
	return s, err
}

// sealable reports whether the image can get a new top.
func (p *Pool) sealable(s subject) bool {
	return p.layers && s.size%overlay.BlockSize == 0 && (s.opening == nil || s.opening.served())
}

// sharesFaster reports whether a reflink copy is to be made. errors.ErrUnsupported
// where neither way is possible.
func (p *Pool) sharesFaster(s subject) (bool, error) {
	sealable := p.sealable(s)
	if s.chain == nil && p.reflinks {
		if !sealable {
			return true, nil
		}
		f, err := os.Open(s.dir + "/" + imageFile)
		if err != nil {
			return false, err
		}
		defer f.Close()
		most := shareExtents
		if s.opening == nil {
			most = shareExtentsClosed
		}
		m, err := sys.MapFile(f, most+1)
		if err == nil && m.Complete && m.Extents <= most {
			return true, nil
		}
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return false, err
		}
	}
	if !sealable {
		return false, fmt.Errorf("its bytes had to be copied: %w", errors.ErrUnsupported)
	}
	return false, nil
}

// shareWhole makes a draft of a flat image by reflink.
func (p *Pool) shareWhole(ctx context.Context, dst, src blockdev.ID) (held time.Duration, err error) {
	from, err := os.Open(p.image(src) + "/" + imageFile)
	if err != nil {
		return 0, err
	}
	defer from.Close()
	status, err := sys.StatusOf(from)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	err = p.create(ctx, dst, status.Size, from)
	return time.Since(begin), err
}

// seal has an image go on in a new layer, and tells what it consisted of: files of
// its directory that nobody writes any more.
func (p *Pool) seal(ctx context.Context, s subject) (sealed *chain, held time.Duration, err error) {
	if sealed := p.sealedBefore(s); sealed != nil {
		return sealed, 0, nil
	}
	sealed = s.chain
	if sealed == nil {
		sealed = &chain{Base: newPart("base"), BaseSize: s.size}
	}
	if len(sealed.Layers) >= maxLayers {
		p.wakeBackground()
		return nil, 0, fmt.Errorf("%w: it has %d layers, the most that there may be; they are being merged in the background: ask again in a while, or detach the volume, which is quicker", blockdev.ErrBusy, len(sealed.Layers))
	}
	if err := p.at("seal.layer"); err != nil {
		return nil, 0, err
	}
	top := newPart("layer")
	if err := layOut(s.dir, top, s.size, overlay.Make); err != nil {
		return nil, 0, err
	}
	record := func() error { return p.recordSeal(s, sealed.with(top)) }
	if s.opening.served() && !s.opening.readOnly {
		held, err = p.sealServed(ctx, s, top, record)
	} else {
		err = record()
	}
	if err == nil && s.chain == nil {
		err = p.dropFlatName(s.dir)
	}
	return sealed, held, err
}

// sealedBefore gives what lies below a top that nobody has written to: it can serve
// once more. nil where there is none.
func (p *Pool) sealedBefore(s subject) *chain {
	if s.chain == nil || s.opening != nil && !s.opening.readOnly {
		return nil
	}
	index, err := os.Open(s.dir + "/" + s.chain.Layers[0] + mapSuffix)
	if err != nil {
		return nil
	}
	defer index.Close()
	_, held, err := overlay.Survey(overlay.OSFile{File: index})
	if err != nil || held > 0 {
		return nil
	}
	below := s.chain.below()
	if len(below.Layers) == 0 && below.far() { // whoever takes it puts a layer of the size over it
		return below
	}
	size := below.BaseSize
	if len(below.Layers) > 0 {
		lower, err := os.Open(s.dir + "/" + below.Layers[0] + mapSuffix)
		if err != nil {
			return nil
		}
		defer lower.Close()
		if size, _, err = overlay.Survey(overlay.OSFile{File: lower}); err != nil {
			return nil
		}
	}
	if size != s.size { // it has grown since
		return nil
	}
	return below
}

// recordSeal makes the new stack the one that is opened, and its top durable. A flat
// image's file becomes the base: by another name first, so that it is found at every
// moment. Whoever writes to the old stack may go on meanwhile: the new top is empty, so
// both read the same. blockdev.ErrFailed where nobody knows which stack a crash would
// leave; after any other error it is the old one.
func (p *Pool) recordSeal(s subject, over *chain) error {
	if err := p.at("seal.base"); err != nil {
		return err
	}
	if s.chain == nil {
		if err := link(s.dir+"/"+imageFile, s.dir+"/"+over.Base); err != nil {
			return err
		}
	}
	if err := p.at("seal.record"); err != nil {
		return err
	}
	top := over.Layers[0]
	err := p.writeChain(s.id, s.dir, over, func() error { return syncLayer(s.dir, top) }, func() error { return syncDir(s.dir) })
	if err == nil || errors.Is(err, blockdev.ErrFailed) {
		return err
	}
	if now, unread := readChain(s.id, s.dir); unread != nil || now != nil && now.Layers[0] == top {
		return fmt.Errorf("%w: %w", blockdev.ErrFailed, errors.Join(err, unread))
	}
	return err
}

// dropFlatName takes a name away that the chain has made meaningless. It need not be
// durable: sweep takes it away, too.
func (p *Pool) dropFlatName(dir string) error {
	if err := p.at("seal.unlink"); err != nil {
		return err
	}
	err := os.Remove(dir + "/" + imageFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return noSpace(err)
}

// linkSealed makes a draft's directory hold exactly what a seal has left of an image.
func (p *Pool) linkSealed(id blockdev.ID, dir string, s subject, sealed *chain) error {
	if len(sealed.Layers) == 0 && !sealed.far() {
		return link(s.dir+"/"+sealed.Base, dir+"/"+imageFile)
	}
	if err := linkParts(sealed, s.dir, sealed.Base, dir); err != nil {
		return err
	}
	same := *sealed
	if len(sealed.Layers) == 0 { // nothing was written over a base that is no file
		top := newPart("layer")
		if err := newLayer(dir, top, s.size); err != nil {
			return err
		}
		same = *sealed.with(top)
	}
	if err := p.at("draft.chain"); err != nil {
		return err
	}
	return p.renameChain(id, dir, &same)
}

// madeDraft makes a draft's directory, which fill fills, whole or not at all.
func (p *Pool) madeDraft(id blockdev.ID, fill func(dir string) error) error {
	dir := p.draft(id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return noSpace(err)
	}
	err := p.at("draft.links")
	if err == nil {
		err = fill(dir)
	}
	if err != nil {
		err = errors.Join(err, p.discard(dir))
	}
	return err
}

// cloneLayered makes a draft over the parts of an image that nobody writes any more;
// base is what their base is called there.
func (p *Pool) cloneLayered(dst blockdev.ID, size int64, from, base string, sealed *chain) error {
	if size%overlay.BlockSize != 0 {
		return fmt.Errorf("a size of %d bytes: %w", size, errors.ErrUnsupported)
	}
	return p.madeDraft(dst, func(dir string) error {
		if err := linkParts(sealed, from, base, dir); err != nil {
			return err
		}
		top := newPart("layer")
		if err := newLayer(dir, top, size); err != nil {
			return err
		}
		if err := p.at("draft.chain"); err != nil {
			return err
		}
		return p.renameChain(dst, dir, sealed.with(top))
	})
}

// immutable reports whether nobody ever writes to a published image of this ID.
func immutable(id blockdev.ID) bool { return !strings.HasPrefix(string(id), blockdev.PrefixVolume+"-") }

package sparse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/opened"
	"holdfast/internal/sys"
)

// severedFile is a body in the making, beside the image's.
const severedFile = imageFile + ".new"

var _ blockdev.Severer = (*Pool)(nil)

// CanSever implements blockdev.Severer: it clones the image and throws the clone
// away.
func (p *Pool) CanSever(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("sparse.CanSever", id, p.canSever(ctx, id))
}

func (p *Pool) canSever(ctx context.Context, id blockdev.ID) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	if p.known(id).served() {
		return nil
	}
	dir := p.image(id)
	body, err := cloneBody(dir)
	if err != nil {
		return err
	}
	return errors.Join(body.Close(), os.Remove(dir+"/"+severedFile))
}

// Sever implements blockdev.Severer: a worker is ended, and the device over it fails. Otherwise by a reflink copy that
// takes the image's name. The device keeps the file that it has, which then has no name.
func (p *Pool) Sever(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("sparse.Sever", id, p.sever(ctx, id))
}

func (p *Pool) sever(ctx context.Context, id blockdev.ID) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	done, err := p.turnToSever(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	dir := p.image(id)
	o := p.known(id)
	if o.served() {
		return p.severServed(ctx, id, dir, o)
	}
	if o == nil {
		found, err := p.foreignDevice(id, dir)
		if err != nil {
			return err
		}
		if o = found; o == nil {
			return nil
		}
	}
	if !o.looped() {
		return fmt.Errorf("open as %s: %w", o.lease, errors.ErrUnsupported)
	}
	body, err := cloneBody(dir)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := syncFile(body); err != nil {
		return err
	}
	if err := p.at("sever.abandon"); err != nil {
		return err
	}
	// Before the device loses the image: after a crash it is found by the image.
	if err := o.device.Abandon(); err != nil {
		return err
	}
	if err := p.at("sever.rename"); err != nil {
		return err
	}
	if err := os.Rename(dir+"/"+severedFile, dir+"/"+imageFile); err != nil {
		return noSpace(err)
	}
	p.forget(id, o.lease)
	if err := p.at("sever.flush"); err != nil {
		return err
	}
	return syncDir(dir)
}

// turnToSever takes the image's turn. Whoever has it and waits for a worker that does not
// answer lets it go when that is killed, which it will be in any case.
func (p *Pool) turnToSever(ctx context.Context, id blockdev.ID) (done func(), err error) {
	if !p.known(id).served() {
		return p.turns.take(ctx, id)
	}
	bounded, cancel := opened.Gently(ctx)
	defer cancel()
	done, err = p.turns.take(bounded, id)
	if err == nil || ctx.Err() != nil {
		return done, err
	}
	p.log.Warn("a worker is killed that others wait for in vain", "id", id)
	if err := p.workers.KillBeside(ctx, id); err != nil { // who has the turn may start the next one
		return nil, err
	}
	return p.turns.take(ctx, id)
}

// cloneBody makes the new body, in place of one that a crash left.
func cloneBody(dir string) (*os.File, error) {
	name := dir + "/" + severedFile
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	from, err := os.Open(dir + "/" + imageFile)
	if err != nil {
		return nil, notFound(err)
	}
	defer from.Close()
	body, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, noSpace(err)
	}
	if err := sys.CloneFile(body, from); err != nil {
		if sys.IsNoReflink(err) {
			err = fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
		}
		return nil, errors.Join(noSpace(err), body.Close(), os.Remove(name))
	}
	return body, nil
}

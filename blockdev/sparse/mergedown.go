package sparse

import (
	"context"
	"errors"
	"fmt"
	"os"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// descent is how far a top has been brought down, as long as nobody writes to it.
type descent struct {
	from, to string // parts
	done     int64  // bytes
}

// forgetDescent is called before an image may be written.
func (p *Pool) forgetDescent(id blockdev.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.descents, id)
}

// descent gives how far it got the last time. The caller has the image's turn.
func (p *Pool) descent(id blockdev.ID, from, to string) *descent {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.descents[id]
	if d == nil || d.from != from || d.to != to {
		d = &descent{from: from, to: to}
		p.descents[id] = d
	}
	return d
}

// underTop is what lies under the top of a chain: the next layer's data, or the base. It is
// "" where that is not a file of this pool.
func (c *chain) underTop() string {
	switch {
	case len(c.Layers) > 1:
		return c.Layers[1] + dataSuffix
	case c.far():
		return ""
	}
	return c.Base
}

// goesDown reports whether it costs less to bring the top of a closed image down into
// what lies under it than the reverse, and nobody else reads from that: it has one name,
// and whoever would give it another needs the image's turn, which the caller has; and
// nobody has it open.
func goesDown(dir string, c *chain) (bool, error) {
	under := c.underTop()
	if under == "" {
		return false, nil
	}
	for _, name := range c.namesUnderTop() {
		f, err := os.Open(dir + "/" + name)
		if err != nil {
			return false, unexplained(name, err)
		}
		status, err := sys.StatusOf(f)
		alone := false
		if err == nil && status.Links == 1 {
			alone, err = sys.OnlyOpening(f)
		}
		if err = errors.Join(err, f.Close()); err != nil || !alone {
			return false, err
		}
	}
	top, errTop := sys.StatusAt(dir + "/" + c.Layers[0] + dataSuffix)
	lower, errLower := sys.StatusAt(dir + "/" + under)
	return top.Allocated < lower.Allocated, errors.Join(errTop, errLower)
}

// namesUnderTop are the files of what lies under the top.
func (c *chain) namesUnderTop() []string {
	if len(c.Layers) > 1 {
		return []string{c.Layers[1] + dataSuffix, c.Layers[1] + mapSuffix}
	}
	return []string{c.Base}
}

// mergeDown brings the top of a closed image down into the layer under it, which then
// is the top. The caller has the turn, and has asked goesDown.
func (p *Pool) mergeDown(ctx context.Context, id blockdev.ID, dir string, c *chain, pace func(n int) error) error {
	return p.descend(ctx, id, dir, c, c.Layers[1], func(v *layered, progress *int64) error {
		into, closeFiles, err := openLayer(dir, c.Layers[1], os.O_RDWR)
		if err != nil {
			return unexplained(c.Layers[1], err)
		}
		if err = p.at("flatten.down"); err == nil {
			m := overlay.Merge{Into: &into, Pace: paceOf(pace), Progress: progress}
			_, _, err = v.Merge(ctx, m, func() error { return p.dropLayer(id, dir, c, 0) })
		}
		return errors.Join(err, closeFiles())
	})
}

// mergeIntoBase brings the only layer of a closed image down into its base, which then
// has all bytes. The caller has the turn, and has asked goesDown.
func (p *Pool) mergeIntoBase(ctx context.Context, id blockdev.ID, dir string, c *chain, pace func(n int) error) error {
	return p.descend(ctx, id, dir, c, c.Base, func(v *layered, progress *int64) error {
		f, err := os.OpenFile(dir+"/"+c.Base, os.O_RDWR, 0)
		if err != nil {
			return unexplained("base", err)
		}
		if err = p.at("flatten.base"); err == nil {
			err = v.MergeIntoBase(ctx, overlay.OSFile{File: f}, paceOf(pace), progress)
		}
		return errors.Join(err, f.Close())
	})
}

func (p *Pool) descend(ctx context.Context, id blockdev.ID, dir string, c *chain, to string, do func(v *layered, progress *int64) error) error {
	d := p.descent(id, c.Layers[0], to)
	v, err := p.assemble(ctx, dir, c, false, nil)
	if err != nil {
		return err
	}
	if err = do(v, &d.done); err == nil {
		p.forgetDescent(id)
	}
	if err := errors.Join(err, v.Close()); err != nil {
		return noSpace(fmt.Errorf("merge down: %w", err))
	}
	return nil
}

func paceOf(pace func(n int) error) overlay.Pace {
	if pace == nil {
		return nil
	}
	return func(_ context.Context, n int64) error { return pace(int(n)) }
}

package sparse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/internal/sys"
)

const (
	// mergeSlice is how many bytes a worker copies before it looks whether somebody
	// wants the image: a snapshot waits for so much.
	mergeSlice = 4 << 20
	// deepMost is how many layers a served volume keeps because its snapshots read from
	// them, where bringing them up takes space. Deeper ones are brought up nevertheless, so
	// that snapshots, which share the chain, stay far from maxLayers.
	deepMost = 16
)

// mergeServed has a worker merge layers under the hands of clients, in slices at the
// pool's rate, until the chain is as short as it may be: a volume whose snapshots come
// and go keeps a short one. A slice that is done stays done whatever happens then. What
// the base has the worker brings up by itself.
func (p *Pool) mergeServed(ctx context.Context, id blockdev.ID, dir string) error {
	if p.known(id).readOnly {
		return nil
	}
	pay := p.pace(ctx)
	for copied := int64(0); ; {
		if err := errors.Join(pay(int(copied)), pay(0)); err != nil { // what was copied, waited for now
			return err
		}
		c, err := readChain(id, dir)
		if err != nil || c == nil {
			return err
		}
		merge, err := p.nextMerge(dir, c)
		if err != nil || merge == nil {
			return err
		}
		w, err := p.worker(ctx, id)
		if errors.Is(err, blockdev.ErrNotFound) {
			return nil // it has died; whoever opens the image again starts another
		}
		if err == nil {
			copied, err = p.mergeSome(context.WithoutCancel(ctx), w, id, dir, c, *merge)
		}
		if err != nil {
			return err
		}
	}
}

// servedMerge is a merge in a chain: of this layer and the one below it.
type servedMerge struct {
	layer int
	down  bool
}

// nextMerge tells what to merge next in the chain of a served image; nil when it is
// short enough. A snapshot has all that lies below its first layer, so what is the
// volume's alone lies on top, and the smaller of two of these goes down into the larger;
// the top itself, to which clients write, stays. The caller has the image's turn.
func (p *Pool) nextMerge(dir string, c *chain) (*servedMerge, error) {
	var sizes []int64 // of those that are its alone
	for _, name := range c.Layers {
		data, errData := sys.StatusAt(dir + "/" + name + dataSuffix)
		index, errMap := sys.StatusAt(dir + "/" + name + mapSuffix)
		if err := errors.Join(errData, errMap); err != nil {
			return nil, unexplained(name, err)
		}
		if data.Links > 1 || index.Links > 1 {
			break
		}
		sizes = append(sizes, data.Allocated)
	}
	for i := 1; i+1 < len(sizes); i++ {
		if sizes[i] <= sizes[i+1] {
			return &servedMerge{layer: i, down: true}, nil
		}
	}
	if len(sizes) > 1 || len(c.Layers) > 1 && (p.reflinks || len(c.Layers) > deepMost) {
		return &servedMerge{}, nil
	}
	return nil, nil
}

// mergeSome has a worker do a slice of a merge, and tells how many bytes it has copied:
// what is shared costs little.
func (p *Pool) mergeSome(ctx context.Context, w *control.Worker, id blockdev.ID, dir string, c *chain, s servedMerge) (copied int64, err error) {
	if err := p.at("merge.absorb"); err != nil {
		return 0, err
	}
	if err := sameLayers(ctx, w, c); err != nil {
		return 0, err
	}
	copied = mergeSlice // by a worker that does not tell
	m, gone := control.Merge{Layer: s.layer, Most: mergeSlice, Copied: &copied}, s.layer+1
	if s.down {
		lower := dir + "/" + c.Layers[s.layer+1]
		data, err := openPart(lower+dataSuffix, os.O_RDWR|syscall.O_DIRECT)
		if err != nil {
			return 0, unexplained(c.Layers[s.layer+1], err)
		}
		defer data.Close()
		index, err := os.OpenFile(lower+mapSuffix, os.O_RDWR, 0)
		if err != nil {
			return 0, unexplained(c.Layers[s.layer+1], err)
		}
		defer index.Close()
		m.Down, gone = &control.Layer{Data: data, Map: index}, s.layer
	}
	_, err = w.Merge(ctx, m, func() error { return p.recordDrop(id, dir, c, gone) })
	if errors.Is(err, blockdev.ErrNotFound) {
		return 0, nil // it has died
	}
	return copied, err
}

// sameLayers makes sure that a worker has as many layers as the chain: both count them
// from the top.
func sameLayers(ctx context.Context, w *control.Worker, c *chain) error {
	s, err := w.Status(ctx)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil // it has died: there is no merge
	}
	if err == nil && (s.Layers == nil || s.Layers.Sealed+1 != len(c.Layers)) {
		err = fmt.Errorf("%w: its worker has other layers than the %d of its chain, a record of which failed: nothing is merged until the volume was detached", blockdev.ErrFailed, len(c.Layers))
	}
	return err
}

// recordDrop is dropLayer for a worker that waits for it. blockdev.ErrFailed where nobody
// knows which stack a crash would leave; after any other error it is the old one.
func (p *Pool) recordDrop(id blockdev.ID, dir string, c *chain, gone int) error {
	layers := len(c.Layers)
	err := p.dropLayer(id, dir, c, gone)
	if err == nil || errors.Is(err, blockdev.ErrFailed) {
		return err
	}
	if now, unread := readChain(id, dir); unread != nil || now == nil || len(now.Layers) != layers {
		return fmt.Errorf("%w: %w", blockdev.ErrFailed, errors.Join(err, unread))
	}
	return err
}

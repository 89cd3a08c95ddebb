package sparse

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

// addressSuffix ends the name of a file that says where a base is by now.
const addressSuffix = ".json"

// address is where a base is that has moved since its images were made. Their chains
// keep the address that they were made with.
type address struct {
	URL    string `json:"url"`
	Digest string `json:"digest"` // SHA-256 of the chunks: of these bytes only, hex
}

// addresses are those of a pool, by the image whose base it is, and who is asking.
type addresses struct {
	changing sync.Mutex // one change at a time

	mu      sync.Mutex
	of      map[blockdev.ID]address
	open    map[*farBase]blockdev.ID // that this process fetches
	changes int
}

func addressOf(id blockdev.ID) string { return addressesDir + "/" + string(id) + addressSuffix }

// SetAddress implements blockdev.RemoteCreator. The address is durable before anybody
// asks there; those who are told late ask at the old one until then. After an error it
// may be so or not, and the same call makes it so.
func (p *Pool) SetAddress(ctx context.Context, id blockdev.ID, base blockdev.RemoteBase) error {
	return blockdev.Op("sparse.SetAddress", id, p.setAddress(ctx, id, base))
}

func (p *Pool) setAddress(ctx context.Context, id blockdev.ID, base blockdev.RemoteBase) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	if !p.layers {
		return fmt.Errorf("the pool has no workers: %w", errors.ErrUnsupported)
	}
	if err := overlay.CheckURL(base.URL); err != nil {
		return err
	}
	p.addresses.changing.Lock()
	defer p.addresses.changing.Unlock()
	to := address{base.URL, hex.EncodeToString(base.Digest[:])}
	if p.addresses.now(id) != to {
		payload, err := json.Marshal(to)
		if err != nil {
			return err
		}
		if err := p.at("address.record"); err != nil {
			return err
		}
		if err := p.replaceEnvelope(p.path(addressesDir), string(id)+addressSuffix, addressOf(id), payload); err != nil {
			return err
		}
		p.addresses.set(id, to)
	}
	if err := p.at("address.tell"); err != nil {
		return err
	}
	return p.tellWorkers(ctx, id)
}

func (a *addresses) now(id blockdev.ID) address {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.of[id]
}

// set has those ask elsewhere that this process has open.
func (a *addresses) set(id blockdev.ID, to address) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.of[id] = to
	a.changes++
	for b, of := range a.open {
		if of == id {
			b.client.CloseIdleConnections()
			b.Moved()
		}
	}
}

func (a *addresses) opened(b *farBase, of blockdev.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.open[b] = of
}

func (a *addresses) closed(b *farBase) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.open, b)
}

// count tells how often addresses have changed.
func (a *addresses) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changes
}

// follows is the image whose address that of a chain is.
func (c *chain) follows() blockdev.ID {
	if c.AddressOf != "" {
		return c.AddressOf
	}
	return c.Origin
}

// urlOf is where a chain's base is now.
func (p *Pool) urlOf(c *chain) string {
	if a := p.addresses.now(c.follows()); a.Digest == c.Digest && a.URL != "" {
		return a.URL
	}
	return c.URL
}

// tellWorkers has those ask at the address of today that serve images of a base.
func (p *Pool) tellWorkers(ctx context.Context, of blockdev.ID) error {
	var mu sync.Mutex
	var errs []error
	p.eachServed(func(id blockdev.ID) {
		dir, _, err := p.locate(id)
		var c *chain
		if err == nil {
			c, err = readChain(id, dir)
		}
		if err == nil && c != nil && c.far() && c.follows() == of {
			err = p.tellWorker(ctx, id, c)
		}
		if err != nil && !errors.Is(err, blockdev.ErrNotFound) {
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, fmt.Errorf("the worker of %s: %w", id, err))
		}
	})
	return errors.Join(errs...)
}

// tellWorker tells one where its base is, and where that may redirect to. None is success;
// one that is silent is told when its image is opened, or it is observed, next.
func (p *Pool) tellWorker(ctx context.Context, id blockdev.ID, c *chain) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	defer func() { p.told(id, ctx.Err() == nil) }()
	w, err := p.workers.Find(ctx, id)
	if err == nil {
		err = w.SetAddress(ctx, p.urlOf(c), p.prefixes.Texts())
	}
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	return err
}

// told notes whether the worker of an image was told where its base is.
func (p *Pool) told(id blockdev.ID, done bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if o := p.openings[id]; o.served() {
		o.untold = !done
	}
}

func (p *Pool) untold(id blockdev.ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	o := p.openings[id]
	return o.served() && o.untold
}

// tellFound is tellWorker for one that an earlier process started, which may have ended
// before it told it of an address, or had others that were allowed; and for one that has
// missed what all were told. Of an address that changes meanwhile it has the last word.
func (p *Pool) tellFound(ctx context.Context, id blockdev.ID, dir string) {
	c, err := readChain(id, dir)
	if err == nil && (c == nil || !c.far()) {
		p.told(id, true)
		return
	}
	for told := -1; err == nil && told != p.addresses.count(); {
		told = p.addresses.count()
		err = p.tellWorker(ctx, id, c)
	}
	if err != nil {
		p.log.Error("tell a worker where its base is", "id", id, "error", err)
	}
}

// readAddresses learns where bases are that have moved.
func (p *Pool) readAddresses() error {
	p.addresses.of, p.addresses.open = map[blockdev.ID]address{}, map[*farBase]blockdev.ID{}
	entries, err := os.ReadDir(p.path(addressesDir))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		id, ok := strings.CutSuffix(entry.Name(), addressSuffix)
		if !ok || !blockdev.ID(id).Valid() {
			continue // one in the making
		}
		var a address
		payload, err := readEnvelope(p.path(addressesDir, entry.Name()), addressOf(blockdev.ID(id)))
		if err == nil {
			err = json.Unmarshal(payload, &a)
		}
		if err == nil {
			err = overlay.CheckURL(a.URL)
		}
		if err != nil { // its images go on asking where they were made to
			p.log.Error("the address that a base has moved to cannot be read", "image", id, "error", err)
			continue
		}
		p.addresses.of[blockdev.ID(id)] = a
	}
	return nil
}

// dropAddresses takes those away that no image follows any more. They need not be gone
// durably. Before anybody uses the pool.
func (p *Pool) dropAddresses() error {
	if len(p.addresses.of) == 0 {
		return nil
	}
	used := map[blockdev.ID]bool{}
	for _, parent := range []string{imagesDir, draftsDir} {
		entries, err := os.ReadDir(p.path(parent))
		if err != nil {
			return err
		}
		for _, entry := range entries {
			c, err := readChain(blockdev.ID(entry.Name()), p.path(parent, entry.Name()))
			if err != nil {
				return nil //nolint:nilerr // a damaged chain is told elsewhere, and may be one that follows
			}
			if c != nil && c.far() {
				used[c.follows()] = true
			}
		}
	}
	for id := range p.addresses.of {
		if used[id] {
			continue
		}
		if err := os.Remove(p.path(addressOf(id))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		delete(p.addresses.of, id)
	}
	return nil
}

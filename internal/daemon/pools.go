package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/lvm"
	"holdfast/blockdev/pools"
	"holdfast/blockdev/sparse"
	"holdfast/engine"
	"holdfast/internal/preflight"
	"holdfast/templates"
)

// The kinds of pool, in the setting pool and in listings.
const (
	kindSparse = "sparse"
	kindLVM    = "lvm"

	homePool = "default"
)

// poolSpec is one word of the setting pool: [NAME=]lvm:VG/THINPOOL or NAME=sparse:/DIRECTORY.
type poolSpec struct{ name, kind, at string }

var poolName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)

func parsePool(text string) (p poolSpec, err error) {
	where := text
	if name, rest, named := strings.Cut(text, "="); named {
		p.name, where = name, rest
	}
	p.kind, p.at, _ = strings.Cut(where, ":")
	switch {
	case p.kind == kindLVM && strings.Count(p.at, "/") == 1 && !strings.HasPrefix(p.at, "/") && !strings.HasSuffix(p.at, "/"):
	case p.kind == kindSparse && filepath.IsAbs(p.at) && filepath.Clean(p.at) == p.at:
	default:
		return p, fmt.Errorf("%q must be [NAME=]lvm:GROUP/THINPOOL or NAME=sparse:/DIRECTORY", text)
	}
	if p.name == "" && p.kind == kindLVM {
		p.name = strings.ToLower(p.at[strings.Index(p.at, "/")+1:])
	}
	if !poolName.MatchString(p.name) || p.name == homePool || p.name == engine.PolicyMostRoom {
		return p, fmt.Errorf("%q: a pool's name is 1 to 40 of a-z, 0-9 and dashes, and neither %q nor %q", text, homePool, engine.PolicyMostRoom)
	}
	return p, nil
}

// parsePools reads the setting.
func parsePools(texts []string) (all []poolSpec, err error) {
	for _, text := range texts {
		p, err := parsePool(text)
		if err != nil {
			return nil, err
		}
		for _, o := range all {
			if o.name == p.name || o.kind == p.kind && o.at == p.at {
				return nil, fmt.Errorf("%q: a pool of this name or place is named before", text)
			}
		}
		all = append(all, p)
	}
	return all, nil
}

// checkPools checks the settings pool and pool_policy.
func (c *Config) checkPools() error {
	all, err := parsePools(c.Pools)
	if err != nil {
		return fmt.Errorf("pool: %w", err)
	}
	known := slices.ContainsFunc(all, func(p poolSpec) bool { return p.name == c.PoolPolicy })
	if !known && c.PoolPolicy != engine.PolicyFirst && c.PoolPolicy != engine.PolicyMostRoom {
		return fmt.Errorf("pool_policy: %q is neither %s nor %s nor a pool", c.PoolPolicy, engine.PolicyFirst, engine.PolicyMostRoom)
	}
	return nil
}

// otherPool is a pool besides the default one.
type otherPool struct {
	poolSpec
	backend blockdev.Backend // nil: err says why
	err     error
	space   *space
	ledger  *engine.Ledger
}

// openPools opens all pools besides the default one. One that cannot be opened is
// told, and keeps none of the others from work.
func (n *node) openPools(ctx context.Context, host string) error {
	specs, err := parsePools(n.c.Pools)
	if err != nil {
		return err
	}
	all := []pools.Pool{{Name: homePool, Kind: kindSparse, Backend: n.pool}}
	for _, spec := range specs {
		p := &otherPool{poolSpec: spec}
		p.backend, p.err = n.openOther(ctx, spec, host)
		if p.err != nil {
			n.log.Error("a pool cannot be opened: its volumes cannot be used until a start at which it can", "pool", spec.name, "kind", spec.kind, "at", spec.at, "cause", p.err)
		} else {
			n.log.Info("pool", "name", spec.name, "kind", spec.kind, "at", spec.at)
		}
		n.others = append(n.others, p)
		all = append(all, pools.Pool{Name: spec.name, Kind: spec.kind, Backend: p.backend, Err: p.err})
	}
	if n.pools, err = pools.New(all...); err != nil {
		return err
	}
	n.pools.OnTrouble(func(pool string, err error) { n.log.Error("a pool does not answer", "pool", pool, "cause", err) })
	return nil
}

func (n *node) openOther(ctx context.Context, spec poolSpec, host string) (blockdev.Backend, error) {
	if spec.kind == kindLVM {
		p, err := lvm.Open(ctx, spec.at, lvm.Options{Host: host, Log: n.log, Extend: lvm.Extend{At: n.c.LVMExtendAt, By: n.c.LVMExtendBy}, Workers: n.workers, Notes: notesDir(host)})
		if err != nil {
			return nil, err
		}
		n.later("pool "+spec.name, func() error { p.Shutdown(); return nil })
		return p, nil
	}
	place, err := sparse.Prepare(ctx, spec.at, sparse.Reflink, 0)
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, blockdev.ErrInvalid) { // it cannot, or could not when it was made
		if n.workers == nil {
			n.log.Warn("the pool cannot share bytes: each volume copies what its template holds", "pool", spec.name)
		}
		place, err = sparse.Prepare(ctx, spec.at, sparse.Copy, 0)
	}
	if err != nil {
		return nil, err
	}
	p, err := sparse.Open(ctx, place.Dir, sparse.Options{Host: host, Log: n.log, Workers: n.workers, Prefixes: n.stores})
	if err != nil {
		return nil, err
	}
	n.later("pool "+spec.name, func() error { p.Shutdown(); return nil })
	return p, nil
}

// openLedgers makes the accounts of the other pools.
func (n *node) openLedgers(ctx context.Context) map[string]templates.Space {
	spaces := map[string]templates.Space{}
	for _, p := range n.others {
		var total int64
		if p.backend != nil {
			capacity, err := p.backend.Capacity(ctx)
			if err != nil { // nothing fits there until the next start; its volumes may be used
				n.log.Error("a pool does not tell its capacity: nothing is made in it", "pool", p.name, "cause", err)
			}
			total = capacity.Total
		}
		p.space = &space{pool: p.backend, name: p.name, log: n.log, free: p.free}
		p.ledger = engine.NewLedger(engine.LedgerOptions{
			Total: total, Ratio: n.c.Overprovision, Reserve: reserve(Config{}, total), Other: p.space.other, Free: p.space.left,
		})
		spaces[p.name] = p.ledger
	}
	return spaces
}

// askTime bounds what an admission waits for a pool; it asks the kernel alone.
const askTime = 5 * time.Second

// free is what the pool can still take: of a thin pool without room for its own
// account nothing.
func (p *otherPool) free() (int64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	if reporter, ok := p.backend.(blockdev.HealthReporter); ok {
		h, err := reporter.Health(ctx)
		if err != nil || h.State != blockdev.PoolHealthy && h.State != blockdev.PoolLow {
			return 0, err
		}
	}
	c, err := p.backend.Capacity(ctx)
	return c.Free, err
}

// enginePools is what the engine is told of them.
func (n *node) enginePools() []engine.OtherPool {
	var all []engine.OtherPool
	for _, p := range n.others {
		creator, can := p.backend.(blockdev.RemoteCreator)
		all = append(all, engine.OtherPool{Name: p.name, Kind: p.kind, Ledger: p.ledger, Remote: can && creator.HoldsRemote(), Err: p.err})
	}
	return all
}

// checkPoolsNow says how the other pools are.
func (n *node) checkPoolsNow(ctx context.Context) (checks []preflight.Check) {
	for _, p := range n.others {
		c := preflight.Check{Name: "pool " + p.name, Status: preflight.OK, Found: p.kind + " " + p.at}
		if p.err != nil {
			c.Status, c.Found = preflight.Warn, p.err.Error()
			c.Consequence, c.Fix = "its volumes cannot be used, and none are made there", "mend it and restart the daemon"
		} else if reporter, ok := p.backend.(blockdev.HealthReporter); ok {
			h, err := reporter.Health(ctx)
			switch {
			case err != nil:
				c.Status, c.Found = preflight.Warn, err.Error()
			case h.State != blockdev.PoolHealthy:
				c.Status, c.Found, c.Fix = preflight.Warn, string(h.State), h.Reason
			}
		}
		checks = append(checks, c)
	}
	return checks
}

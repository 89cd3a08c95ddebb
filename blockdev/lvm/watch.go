package lvm

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"holdfast/blockdev"
)

// Extend says when a pool gets more space by itself, as LVM's own daemon would do
// it by thin_pool_autoextend_threshold (lvmthin(7)); that need not run.
type Extend struct {
	At int // percent of data or metadata that is used; 0: never; else 50 to 99
	By int // percent of what there is, or all that the volume group still has; 0: 20
}

const (
	// watchEvery is how often the pool's state is looked at. A full pool lets writes
	// wait for a minute (dm-thin's no_space_timeout).
	watchEvery    = time.Second
	defaultExtend = 20
)

func (x Extend) check() error {
	if x.At != 0 && (x.At < 50 || x.At > 99) || x.By < 0 || x.By > 1000 {
		return fmt.Errorf("%w: a pool is extended when 50 to 99 %% of it are used, by up to 1000 %%: not at %d by %d", blockdev.ErrInvalid, x.At, x.By)
	}
	return nil
}

// watch extends the pool when it is to be.
func (p *Pool) watch(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	refused := "" // the group's metadata when it had no room
	for {
		s, err := p.status()
		if err != nil {
			p.log.Warn("the pool's state cannot be read", "pool", p.Name(), "cause", err)
		} else {
			refused = p.extendPool(ctx, s, refused)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// extendPool gives the pool more space when it is to have it. While the group has
// none left nothing is tried: refused is the stamp of its metadata then.
func (p *Pool) extendPool(ctx context.Context, s status, refused string) string {
	if p.trouble(s) != nil || refused != "" && refused == p.state().stamp {
		return refused
	}
	for _, part := range []struct {
		name, option string
		use          use
		block        int64
	}{{"data", "-L", s.data, p.chunk}, {"metadata", "--poolmetadatasize", s.meta, metaBlock}} {
		if part.use.percent() < int64(p.extending.At) {
			continue
		}
		by := p.roundUp(max(1, part.use.total*part.block/100*int64(p.extending.By)))
		err := p.lengthen(ctx, part.option, by)
		switch {
		case errors.Is(err, blockdev.ErrNoSpace):
			p.log.Warn("the pool is to be extended, and its volume group has no room", "pool", p.Name(), "part", part.name, "cause", err)
			return p.state().stamp
		case err != nil:
			p.log.Error("the pool could not be extended", "pool", p.Name(), "part", part.name, "cause", err)
			return p.state().stamp
		default:
			p.log.Info("the pool has more room", "pool", p.Name(), "part", part.name)
		}
	}
	return ""
}

// lengthen makes the pool's data or metadata longer by so many bytes, or by what the
// volume group has.
func (p *Pool) lengthen(ctx context.Context, option string, by int64) error {
	err := p.change(ctx, "extend the pool", outcome{}, "lvextend", option, fmt.Sprintf("+%db", by), p.Name())
	if !errors.Is(err, blockdev.ErrNoSpace) {
		return err
	}
	text, ask := p.ask(ctx, "vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", p.group)
	if ask != nil {
		return errors.Join(err, ask)
	}
	free, ask := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if ask != nil {
		return errors.Join(err, fmt.Errorf("%w: vgs: %.100q", errNonsense, text))
	}
	if free < p.extent || free >= by {
		return err
	}
	return p.change(ctx, "extend the pool", outcome{}, "lvextend", option, fmt.Sprintf("+%db", free), p.Name())
}

package lvm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// status is what the kernel tells of a thin pool.
type status struct {
	mode         string // "rw", "ro", "out_of_data_space", "Fail", "Error"
	needsCheck   bool   // it takes no changes until thin_check has passed it
	errorsOnFull bool   // writes fail at once when it is full; else they wait for space
	shows        bool   // new blocks are not zeroed
	keeps        bool   // discards give nothing back
	data, meta   use
}

// use is in blocks: of the pool's chunk size, and of metaBlock.
type use struct{ used, total int64 }

func (u use) percent() int64 { return u.used * 100 / max(u.total, 1) }

const (
	// metaBlock is the size of a block of a thin pool's metadata (THIN_METADATA_BLOCK_SIZE
	// of drivers/md/dm-thin-metadata.h), in bytes.
	metaBlock = 4096
	// mappingBytes is what the account of one chunk needs, by the kernel's own rule
	// (Documentation/admin-guide/device-mapper/thin-provisioning.rst, "Setting up").
	mappingBytes = 48
	// lowData and lowMeta are the percentages from which a pool is low. LVM makes no
	// more volumes when less than a quarter of small metadata is free.
	lowData, lowMeta = 90, 75
)

// Health implements blockdev.HealthReporter.
func (p *Pool) Health(ctx context.Context) (blockdev.Health, error) {
	if err := ctx.Err(); err != nil {
		return blockdev.Health{}, blockdev.Op("lvm.Health", "", err)
	}
	s, err := p.status()
	return p.diagnose(s), blockdev.Op("lvm.Health", "", err)
}

func (p *Pool) status() (status, error) {
	pool := p.dmName(p.thin) + "-tpool"
	target, line, err := sys.MapperStatus(pool)
	if err == nil && target != "thin-pool" {
		err = fmt.Errorf("%w: %s is %q", errNonsense, p.Name(), target)
	}
	if err != nil {
		return status{}, err
	}
	s, err := parseStatus(line)
	if err != nil {
		return s, err
	}
	_, table, err := sys.MapperTable(pool)
	features := strings.Fields(table)
	s.shows, s.keeps = slices.Contains(features, "skip_block_zeroing"), slices.Contains(features, "ignore_discard")
	return s, err
}

// parseStatus reads the status line of the thin-pool target (Documentation/
// admin-guide/device-mapper/thin-provisioning.rst, "Status").
func parseStatus(line string) (status, error) {
	f := strings.Fields(line)
	if len(f) == 1 && (f[0] == "Fail" || f[0] == "Error") {
		return status{mode: f[0]}, nil
	}
	if len(f) < 8 || !slices.Contains([]string{"rw", "ro", "out_of_data_space"}, f[4]) {
		return status{}, fmt.Errorf("%w: status of the thin pool: %.200q", errNonsense, line)
	}
	s := status{mode: f[4], errorsOnFull: f[6] == "error_if_no_space", needsCheck: f[7] == "needs_check"}
	for _, u := range []struct {
		text string
		to   *use
	}{{f[1], &s.meta}, {f[2], &s.data}} {
		if _, err := fmt.Sscanf(u.text, "%d/%d", &u.to.used, &u.to.total); err != nil {
			return status{}, fmt.Errorf("%w: status of the thin pool: %.200q: %w", errNonsense, line, err)
		}
	}
	return s, nil
}

// diagnose says what a status means, and what to do.
func (p *Pool) diagnose(s status) blockdev.Health {
	h := blockdev.Health{
		State: blockdev.PoolHealthy,
		Data:  blockdev.Use{Used: s.data.used * p.chunk, Total: s.data.total * p.chunk},
		Meta:  blockdev.Use{Used: s.meta.used * metaBlock, Total: s.meta.total * metaBlock},
	}
	name := p.Name()
	switch {
	case s.mode == "Fail" || s.mode == "Error":
		h.State = blockdev.PoolFailed
		h.Reason = "the kernel has given the pool up: look at its disks (dmesg), then stop what uses it, lvchange -an and lvchange -ay " + name + ", or lvconvert --repair " + name
	case s.mode == "ro" || s.needsCheck:
		h.State = blockdev.PoolNeedsRepair
		h.Reason = "a change of the pool's metadata failed (dmesg): stop what uses it, deactivate it and all of its volumes, "
		if s.meta.percent() >= lowMeta {
			h.Reason += "lvextend --poolmetadatasize +SIZE " + name + ", "
		}
		h.Reason += "lvchange -ay " + name + ", which checks it; if that finds damage, lvconvert --repair " + name
	case s.mode == "out_of_data_space" || s.data.total > 0 && s.data.used >= s.data.total:
		h.State = blockdev.PoolFull
		h.Reason = "the pool has no free block: lvextend -L +SIZE " + name + ", or delete volumes; writes that need one "
		if s.errorsOnFull {
			h.Reason += "fail"
		} else {
			h.Reason += "wait for a minute, then fail"
		}
	case s.meta.percent() >= lowMeta:
		h.State, h.Reason = blockdev.PoolLow, fmt.Sprintf("%d %% of the pool's metadata is used: lvextend --poolmetadatasize +SIZE %s", s.meta.percent(), name)
	case s.data.percent() >= lowData:
		h.State, h.Reason = blockdev.PoolLow, fmt.Sprintf("%d %% of the pool is used: lvextend -L +SIZE %s, or delete volumes", s.data.percent(), name)
	}
	return h
}

// sound is an error while the pool takes no changes.
func (p *Pool) sound() error {
	s, err := p.status()
	if err != nil {
		return err
	}
	return p.trouble(s)
}

// warnOfSettings logs what an operator may not have meant.
func (p *Pool) warnOfSettings() error {
	s, err := p.status()
	if s.keeps {
		p.log.Warn("the thin pool ignores discards: what is deleted in volumes is never given back; lvchange --discards passdown", "pool", p.Name())
	}
	return err
}

// trouble is blockdev.ErrNeedsRepair, with what to do, when that is the pool's state.
func (p *Pool) trouble(s status) error {
	switch h := p.diagnose(s); h.State {
	case blockdev.PoolNeedsRepair, blockdev.PoolFailed:
		return fmt.Errorf("%w: %s", blockdev.ErrNeedsRepair, h.Reason)
	}
	return nil
}

// admits is an error while the pool is none to put new images into.
func (p *Pool) admits() error {
	s, err := p.status()
	if err == nil {
		err = p.trouble(s)
	}
	switch h := p.diagnose(s); {
	case err != nil:
		return err
	case s.shows:
		return p.unzeroed()
	case h.State == blockdev.PoolFull:
		return fmt.Errorf("%w: %s", blockdev.ErrNoSpace, h.Reason)
	}
	return nil
}

func (p *Pool) unzeroed() error {
	return fmt.Errorf("%w: thin pool %s does not zero new blocks, a volume would show what others have deleted: lvchange --zero y %s", blockdev.ErrInvalid, p.Name(), p.Name())
}

// explain adds the pool's state to an error that it may be the cause of.
func (p *Pool) explain(err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []error{blockdev.ErrBusy, blockdev.ErrExists, blockdev.ErrNotFound, blockdev.ErrInvalid, blockdev.ErrNeedsRepair, context.Canceled} {
		if errors.Is(err, known) {
			return err
		}
	}
	s, cause := p.status()
	if cause != nil {
		return err
	}
	if trouble := p.trouble(s); trouble != nil {
		return fmt.Errorf("%w: %w", trouble, err)
	}
	if h := p.diagnose(s); h.State == blockdev.PoolFull && !errors.Is(err, blockdev.ErrNoSpace) {
		return fmt.Errorf("%w: %s: %w", blockdev.ErrNoSpace, h.Reason, err)
	}
	return err
}

// Capacity implements blockdev.Backend. What is free is what can be written: also
// the room in the pool's metadata bounds it.
func (p *Pool) Capacity(ctx context.Context) (blockdev.Capacity, error) {
	c, err := p.capacity(ctx)
	return c, blockdev.Op("lvm.Capacity", "", err)
}

func (p *Pool) capacity(ctx context.Context) (c blockdev.Capacity, err error) {
	if err := ctx.Err(); err != nil {
		return c, err
	}
	s, err := p.status()
	if err == nil {
		err = p.trouble(s)
	}
	if err != nil {
		return c, err
	}
	c.Free, c.Allocated = s.room()*p.chunk, s.data.used*p.chunk
	c.Total = c.Allocated + c.Free
	c.Trash, err = p.trash(ctx)
	return c, err
}

// room is how many chunks can still be written.
func (s status) room() int64 {
	return max(0, min(s.data.total-s.data.used, (s.meta.total-s.meta.used)*metaBlock/mappingBytes))
}

package sparse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/loop"
	"holdfast/internal/sys"
)

// began is what the lock file beside an image says of the device that was made
// of it: the kernel's counters go on from one use of a loop number to the next.
// It is never flushed, because after a power cut there is no device either.
type began struct {
	Boot     string            `json:"boot"`
	Sequence uint64            `json:"sequence"`
	Counters blockdev.Counters `json:"counters"` // of the loop device when it was made
}

// maxBegan bounds what is read of a lock file.
const maxBegan = 4096

// noteBegin writes down where a new device's counters begin. Counting is not
// worth a failed Open: what cannot be noted is not counted.
func noteBegin(lock *os.File, device loop.Device) {
	now, err := device.Counters()
	if err != nil {
		return
	}
	boot, err := sys.BootID()
	if err != nil {
		return
	}
	now.Since = time.Now().UTC().Round(0)
	b, err := json.Marshal(began{Boot: boot, Sequence: device.Sequence, Counters: now})
	if err != nil || lock.Truncate(0) != nil {
		return
	}
	_, _ = lock.WriteAt(b, 0)
}

// Counters implements blockdev.Meter. A worker's begin anew when it has died. errors.ErrUnsupported for a device that
// was made without a note of where it began.
func (p *Pool) Counters(ctx context.Context, id blockdev.ID) (blockdev.Counters, error) {
	c, err := p.counters(ctx, id)
	return c, blockdev.Op("sparse.Counters", id, err)
}

func (p *Pool) counters(ctx context.Context, id blockdev.ID) (blockdev.Counters, error) {
	if err := check(ctx, id); err != nil {
		return blockdev.Counters{}, err
	}
	p.mu.Lock()
	o := p.openings[id]
	p.mu.Unlock()
	if o.served() {
		return p.ServedCounters(ctx, id)
	}
	if !o.looped() {
		return blockdev.Counters{}, blockdev.ErrNotFound
	}
	b, err := io.ReadAll(io.NewSectionReader(o.lock, 0, maxBegan))
	if err != nil {
		return blockdev.Counters{}, err
	}
	var start began
	boot, err := sys.BootID()
	if err != nil {
		return blockdev.Counters{}, err
	}
	if json.Unmarshal(b, &start) != nil || start.Boot != boot || start.Sequence != o.device.Sequence {
		return blockdev.Counters{}, fmt.Errorf("nobody noted where the counters of %s begin: %w", o.device.Path, errors.ErrUnsupported)
	}
	now, err := o.device.Counters()
	if err != nil {
		return blockdev.Counters{}, err
	}
	now = now.Less(start.Counters)
	now.Since = start.Counters.Since
	return now, nil
}

// Exclusive implements blockdev.Accountant. Where the filesystem shares nothing,
// or cannot tell extents, all that is allocated is the image's own.
func (p *Pool) Exclusive(ctx context.Context, id blockdev.ID) (int64, error) {
	n, err := p.exclusive(ctx, id)
	return n, blockdev.Op("sparse.Exclusive", id, err)
}

func (p *Pool) exclusive(ctx context.Context, id blockdev.ID) (int64, error) {
	if err := check(ctx, id); err != nil {
		return 0, err
	}
	dir, _, err := p.locate(id)
	if err != nil {
		return 0, err
	}
	c, err := readChain(id, dir)
	if err != nil {
		return 0, err
	}
	names := []string{imageFile}
	if c != nil {
		names = c.files()
	}
	var bytes int64
	for _, name := range names {
		n, err := exclusiveOf(dir+"/"+name, math.MaxInt)
		if err != nil {
			return 0, err
		}
		bytes += n
	}
	return bytes, nil
}

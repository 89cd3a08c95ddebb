package sparse

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"holdfast/blockdev"
)

// sharedAge is how long a sum of shared bytes is good: it costs a look at the
// extents of every image.
const sharedAge = time.Minute

// sharedSum is the last sum, and when it was made.
type sharedSum struct {
	mu    sync.Mutex
	bytes int64
	at    time.Time
}

// SharedBytes tells how many of the bytes that images refer to are shared with
// another image, each counted once per image that refers to it. It is up to a
// minute old.
func (p *Pool) SharedBytes(ctx context.Context) (int64, error) {
	p.shared.mu.Lock()
	defer p.shared.mu.Unlock()
	if time.Since(p.shared.at) < sharedAge {
		return p.shared.bytes, nil
	}
	entries, err := os.ReadDir(p.path(imagesDir))
	if err != nil {
		return 0, blockdev.Op("sparse.SharedBytes", "", err)
	}
	var sum int64
	for _, entry := range entries {
		info, err := p.Stat(ctx, blockdev.ID(entry.Name()))
		switch {
		case err == nil:
			sum += info.Shared
		case ctx.Err() != nil:
			return 0, blockdev.Op("sparse.SharedBytes", "", ctx.Err())
		case errors.Is(err, blockdev.ErrFailed):
			return 0, blockdev.Op("sparse.SharedBytes", "", err)
		} // what is damaged, or was removed meanwhile, shares nothing that we know of
	}
	p.shared.bytes, p.shared.at = sum, time.Now()
	return sum, nil
}

package templates

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"holdfast/blockdev"
)

// retainInterval is the time between two looks at what retention says.
const retainInterval = time.Hour

// scrubLook is the longest time between two looks for images that are due.
const scrubLook = 10 * time.Minute

// Run does what is to be done without being asked, until ctx ends: retention by
// age, and the scrub.
func (l *Library) Run(ctx context.Context) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.scrubs(ctx)
	}()
	defer func() { <-done }()
	tick := time.NewTicker(retainInterval)
	defer tick.Stop()
	for {
		if err := l.Retain(ctx); err != nil && ctx.Err() == nil {
			l.o.Log.Error("retention could not be applied", "cause", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (l *Library) scrubs(ctx context.Context) {
	if l.o.ScrubInterval <= 0 {
		return
	}
	for {
		if err := l.Scrub(ctx); err != nil && ctx.Err() == nil {
			l.o.Log.Error("scrub", "cause", err)
		}
		if sleep(ctx, min(scrubLook, l.o.ScrubInterval)) != nil {
			return
		}
	}
}

// Scrub verifies the images that are due, at Options.ScrubRate: those not
// verified for Options.ScrubInterval, and after an unclean stop all. Cached
// sources of that age are not verified but dropped: they are made again, from
// verified images. Damage is recorded and no error; errors are joined.
func (l *Library) Scrub(ctx context.Context) error {
	var errs []error
	for {
		id, ok := l.due()
		if !ok {
			break
		}
		if _, err := l.verify(ctx, id, l.o.ScrubRate); err != nil && !errors.Is(err, ErrNotFound) {
			return errors.Join(append(errs, err)...)
		}
		l.scrubbedImages.Add(1)
	}
	l.sources.expire(l.now().Add(-l.o.ScrubInterval))
	return errors.Join(errs...)
}

// due is the revision that most needs to be verified now, if any does.
func (l *Library) due() (blockdev.ID, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var waiting []Revision
	before := l.now().Add(-l.o.ScrubInterval)
	for _, r := range l.records {
		for _, v := range r.Template.Revisions {
			if v.Status == Ready && (l.suspect[v.ID] || v.lastGood().Before(before)) {
				waiting = append(waiting, v)
			}
		}
	}
	if len(waiting) == 0 {
		return "", false
	}
	return slices.MinFunc(waiting, func(a, b Revision) int {
		return cmp.Or(a.lastGood().Compare(b.lastGood()), cmp.Compare(a.ID, b.ID))
	}).ID, true
}

// lastGood is when the image was last known to be what it should.
func (v Revision) lastGood() time.Time {
	if v.VerifiedAt.After(v.ReadyAt) {
		return v.VerifiedAt
	}
	return v.ReadyAt
}

// expire drops images that were made before a time.
func (c *sourceCache) expire(before time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.bySpec {
		if s.place != nil && madeAt(s.id).Before(before) {
			c.removeLater(c.takeOut(s))
		}
	}
}

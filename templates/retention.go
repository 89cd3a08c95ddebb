package templates

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"holdfast/blockdev"
)

// Retention says how long READY revisions are kept. A zero field: as the node
// has it (Options.KeepRevisions, KeepAge).
type Retention struct {
	Versions int `json:"versions,omitempty"` // that are kept, the newest ones; pinned ones do not count
	Days     int `json:"days,omitempty"`     // after which one goes
}

// Limits of what a template's owner may choose.
const (
	maxKeptVersions = 300
	maxKeptDays     = 36500
)

func (t Template) keeps(o Options) (versions int, age time.Duration) {
	versions, age = o.KeepRevisions, o.KeepAge
	if t.Retention.Versions > 0 {
		versions = t.Retention.Versions
	}
	if t.Retention.Days > 0 {
		age = time.Duration(t.Retention.Days) * 24 * time.Hour
	}
	return versions, age
}

// outdated takes out of a record what retention says, oldest first, and gives
// the events that say why. Never the newest READY one, a pinned one, one that is
// being read or that a volume waits for; nor just, which was made this moment.
func (l *Library) outdated(r *record, just blockdev.ID) (gone []blockdev.ID, events []Event) {
	versions, age := r.Template.keeps(l.o)
	now, kept, newest := l.now(), 0, true
	awaited := l.awaitedRevisions()
	var over []Event
	var ids []blockdev.ID
	for _, v := range slices.Backward(r.Template.Revisions) {
		if v.Status != Ready || v.Pinned != nil {
			newest = newest && v.Status != Ready
			continue
		}
		kept++
		var why string
		switch old := now.Sub(v.ReadyAt); {
		case newest || v.ID == just:
		case kept > versions:
			why = "of unpinned versions " + counted(versions, "is", "are") + " kept"
		case age > 0 && old > age:
			why = "versions are kept for " + counted(int(age/(24*time.Hour)), "day", "days")
		}
		newest = false
		if why == "" || awaited[v.ID] || l.isRead(v.ID) {
			continue
		}
		ids = append(ids, v.ID)
		over = append(over, Event{Time: now, Type: Retired, Version: v.Name, Message: why})
	}
	slices.Reverse(ids)
	slices.Reverse(over)
	for i, id := range ids {
		r.remove(id)
		r.happened(over[i])
	}
	return ids, over
}

func counted(n int, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, more)
}

func (l *Library) isRead(id blockdev.ID) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.pins[id] > 0
}

// Await tells the library who knows which revisions volumes still have to be
// filled from: those are not removed by retention.
func (l *Library) Await(revisions func() map[blockdev.ID]bool) { l.awaited.Store(&revisions) }

func (l *Library) awaitedRevisions() map[blockdev.ID]bool {
	if ask := l.awaited.Load(); ask != nil {
		return (*ask)()
	}
	return nil
}

// Retain applies the retention of all templates now. What fails is tried again
// the next time; the errors are joined.
func (l *Library) Retain(ctx context.Context) error {
	l.mu.RLock()
	keys := slices.Sorted(maps.Keys(l.records))
	l.mu.RUnlock()
	var errs []error
	for _, key := range keys {
		if err := l.retain(ctx, key); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	return errors.Join(errs...)
}

// retainSoon applies retention once more: what a new revision was made from was
// still being read when that was recorded. Run does it again should it fail.
func (l *Library) retainSoon(ctx context.Context, key string) {
	if err := l.retain(context.WithoutCancel(ctx), key); err != nil {
		l.o.Log.Error("retention could not be applied", "template", key, "cause", err)
	}
}

// errNothing ends a change that would change nothing.
var errNothing = errors.New("nothing to do")

func (l *Library) retain(ctx context.Context, key string) error {
	lock := l.locks.lock(key)
	defer lock.Unlock()
	var gone []blockdev.ID
	var events []Event
	r, err := l.changeLocked(ctx, key, func(r *record) (*record, error) {
		if r == nil {
			return nil, errNothing
		}
		if gone, events = l.outdated(r, ""); len(gone) == 0 {
			return nil, errNothing
		}
		return r, nil
	})
	if errors.Is(err, errNothing) {
		return nil
	}
	if err != nil {
		return err
	}
	l.retired(context.WithoutCancel(ctx), r, gone, events)
	return nil
}

// retired takes away the images of revisions that retention took out of a
// record, and tells of it.
func (l *Library) retired(ctx context.Context, r *record, gone []blockdev.ID, events []Event) {
	for i, id := range gone {
		if err := l.retire(ctx, r, id); err != nil {
			l.o.Log.Error("an old version's image stays until the next start", "image", id, "error", err)
		}
		l.tell(r, events[i])
	}
}

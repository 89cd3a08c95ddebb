package engine

import (
	"cmp"
	"context"
	"slices"
	"sync"
)

const (
	// keepHappenings bounds what the feed remembers of one workspace, and of all
	// together.
	keepHappenings = 1000
)

// Happening is an event of a volume, in the node's feed.
type Happening struct {
	Sequence  uint64 // orders the feed; rises also over restarts
	Workspace string
	Volume    string // its name
	Event
}

// feed is the newest events of all volumes, in memory. The events themselves are
// in the volumes' records; after a restart the feed begins with those. Many
// events of one workspace push out no other's.
type feed struct {
	mu    sync.Mutex
	last  uint64
	all   happenings
	each  map[string]*happenings
	added chan struct{} // closed and replaced when something is added
}

// happenings are the newest keepHappenings, in order.
type happenings struct {
	list    []Happening
	dropped uint64 // sequence of the newest one that is not kept any more
}

func (h *happenings) add(one Happening) {
	h.list = append(h.list, one)
	if over := len(h.list) - keepHappenings; over > keepHappenings { // in large steps: moving costs
		h.dropped = h.list[over-1].Sequence
		h.list = slices.Delete(h.list, 0, over)
	}
}

// newFeed makes an empty feed; sequences begin above start.
func newFeed(start uint64) *feed {
	return &feed{last: start, each: map[string]*happenings{}, added: make(chan struct{})}
}

// seed takes in what the records have.
func (f *feed) seed(found []Happening) {
	slices.SortStableFunc(found, func(a, b Happening) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.Volume, b.Volume))
	})
	for _, one := range found {
		f.add(one)
	}
}

func (f *feed) add(one Happening) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last++
	one.Sequence = f.last
	f.all.add(one)
	mine := f.each[one.Workspace]
	if mine == nil {
		mine = &happenings{}
		f.each[one.Workspace] = mine
	}
	mine.add(one)
	close(f.added)
	f.added = make(chan struct{})
}

// since gives what came after a sequence, oldest first, at most limit (the newest
// of them), and whether some are left out because they are not kept, or are too
// many. next is what to ask with the next time.
func (f *feed) since(workspace string, after uint64, limit int) (found []Happening, next uint64, lost bool, added <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	from := &f.all
	if workspace != "" {
		if from = f.each[workspace]; from == nil {
			return nil, f.last, false, f.added
		}
	}
	first, _ := slices.BinarySearchFunc(from.list, after, func(h Happening, after uint64) int {
		return cmp.Compare(h.Sequence, after+1)
	})
	found = from.list[first:]
	lost = from.dropped > after
	if over := len(found) - limit; over > 0 {
		found, lost = found[over:], true
	}
	return slices.Clone(found), f.last, lost, f.added
}

// tell puts into the feed what a volume's record has and the one before had not.
func (e *Engine) tell(before, now Volume) {
	fresh := now.Events
	if n := len(before.Events); n > 0 {
		last := before.Events[n-1]
		for i := len(fresh) - 1; i >= 0; i-- {
			if fresh[i].Time.Equal(last.Time) && fresh[i].Type == last.Type && fresh[i].Message == last.Message {
				fresh = fresh[i+1:]
				break
			}
		}
	}
	for _, event := range fresh {
		e.feed.add(Happening{Workspace: now.Workspace, Volume: now.Name, Event: event})
	}
}

// Happenings gives the events of a workspace's volumes (empty: of all) that came
// after a sequence, oldest first and at most limit, the newest of them. next is
// the sequence to ask with the next time; lost says that some were left out.
//
// When there are none and wait is not nil, it waits until there is one, wait
// delivers or ctx ends: that is no error.
func (e *Engine) Happenings(ctx context.Context, workspace string, after uint64, limit int, wait <-chan struct{}) (found []Happening, next uint64, lost bool) {
	for {
		found, next, lost, added := e.feed.since(workspace, after, limit)
		if len(found) > 0 || wait == nil {
			return found, next, lost
		}
		select {
		case <-added:
		case <-wait:
			return nil, next, lost
		case <-ctx.Done():
			return nil, next, lost
		}
	}
}

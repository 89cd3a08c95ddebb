package api

import (
	"strconv"
	"time"
)

const (
	defaultEvents = 100
	maxEvents     = 500
	maxEventWait  = 30 * time.Second
)

// FeedEvent is an event in the node's feed: of which volume, and where in the feed.
type FeedEvent struct {
	Sequence  string `json:"sequence"`
	Workspace string `json:"workspace"`
	Volume    string `json:"volume"`
	Event
}

// EventList is a part of the feed, oldest first.
type EventList struct {
	Data []FeedEvent `json:"data"`
	Next string      `json:"next"` // what to ask after, the next time
	Lost bool        `json:"lost"` // some between are left out
}

// listEvents gives the newest events of the workspace's volumes or, with
// ?after=, those since; with ?wait= it waits until there is one.
func listEvents(c *call) error {
	q := c.r.URL.Query()
	limit, err := boundedCount("limit", q.Get("limit"), defaultEvents, maxEvents)
	if err != nil {
		return err
	}
	var after uint64
	if text := q.Get("after"); text != "" {
		if after, err = strconv.ParseUint(text, 10, 64); err != nil {
			return invalid("after", "must be what an earlier answer gave as next")
		}
	}
	wait, stop, err := c.eventWait(q.Get("wait"))
	if err != nil {
		return err
	}
	defer stop()
	found, next, lost := c.s.o.Engine.Happenings(c.r.Context(), c.workspace, after, limit, wait)
	list := EventList{Data: make([]FeedEvent, len(found)), Next: strconv.FormatUint(next, 10), Lost: lost && q.Get("after") != ""}
	for i, h := range found {
		list.Data[i] = FeedEvent{
			Sequence: strconv.FormatUint(h.Sequence, 10), Workspace: h.Workspace, Volume: h.Volume,
			Event: eventBody(h.Event),
		}
	}
	return c.json(list)
}

// eventWait reads ?wait=, in seconds. The channel delivers when the time is over
// or the server stops; nil: do not wait.
func (c *call) eventWait(text string) (<-chan struct{}, func(), error) {
	if text == "" || text == "0" {
		return nil, func() {}, nil
	}
	seconds, err := boundedCount("wait", text, 0, int(maxEventWait/time.Second))
	if err != nil {
		return nil, nil, err
	}
	over := make(chan struct{})
	done := make(chan struct{})
	timer := time.NewTimer(min(time.Duration(seconds)*time.Second, c.s.o.Limits.Request/2))
	go func() {
		defer close(over)
		select {
		case <-timer.C:
		case <-c.s.drained:
		case <-done:
		}
	}()
	return over, func() { timer.Stop(); close(done) }, nil
}

// boundedCount reads a whole number of at least 1; more than most is most.
func boundedCount(field, text string, otherwise, most int) (int, error) {
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		return 0, invalid(field, "must be a whole number of at least 1 (more than %d is %d)", most, most)
	}
	return min(n, most), nil
}

// Identity is who a key makes its bearer.
type Identity struct {
	Name         string `json:"name"`
	Role         string `json:"role"`
	Workspace    string `json:"workspace,omitempty"` // that this request is about
	ControlPlane bool   `json:"controlPlane"`
}

func whoami(c *call) error {
	return c.json(Identity{
		Name: c.principal.actor(), Role: string(c.principal.Role), Workspace: c.workspace, ControlPlane: c.principal.ControlPlane,
	})
}

package templates

import (
	"log/slog"
	"slices"
	"time"
)

// EventType says what the library did, or found, by itself.
type EventType string

// The types of event.
const (
	Retired  EventType = "retired"  // retention removed a revision
	Damaged  EventType = "damaged"  // an image is not what was published
	Restored EventType = "restored" // a damaged image is what was published again
)

// Event is something that happened to a template without being asked for.
type Event struct {
	Time    time.Time `json:"time"`
	Type    EventType `json:"type"`
	Version string    `json:"version"` // name of the revision
	Message string    `json:"message"`
}

// maxEvents bounds those that a template keeps; the oldest go.
const maxEvents = 50

// Happening is an event and whose it is, for the log of the node.
type Happening struct {
	Workspace, Template string
	Event
}

// happened notes an event in a record that is being changed.
func (r *record) happened(e Event) {
	r.Template.Events = append(r.Template.Events, e)
	if over := len(r.Template.Events) - maxEvents; over > 0 {
		r.Template.Events = slices.Clone(r.Template.Events[over:])
	}
}

// tell logs an event that is durable now, and tells whoever asked for it.
func (l *Library) tell(r *record, e Event) {
	level := slog.LevelInfo
	if e.Type == Damaged {
		level = slog.LevelError
	}
	l.o.Log.LogAttrs(l.stopping, level, "template "+string(e.Type), slog.String("template", r.key()),
		slog.String("version", e.Version), slog.String("reason", e.Message))
	if l.o.OnEvent != nil {
		l.o.OnEvent(Happening{r.Template.Workspace, r.Template.Name, e})
	}
}

package api

import (
	"encoding/json"
	"time"

	"holdfast/engine"
)

// Metadata is the common part of all resources. Times are RFC 3339 in UTC with
// up to nanoseconds.
type Metadata struct {
	Name        string            `json:"name"`
	DisplayName string            `json:"displayName,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	ExternalID  string            `json:"externalId,omitempty"`
	Workspace   string            `json:"workspace"`
	CreatedAt   string            `json:"createdAt"`
	UpdatedAt   string            `json:"updatedAt"`
	CreatedBy   string            `json:"createdBy,omitempty"`
	UpdatedBy   string            `json:"updatedBy,omitempty"`
}

// Volume is a volume on the wire.
type Volume struct {
	Metadata     Metadata    `json:"metadata"`
	Spec         VolumeSpec  `json:"spec"`
	Events       []Event     `json:"events"`
	State        VolumeState `json:"state"`
	Status       string      `json:"status"`
	TerminatedAt string      `json:"terminatedAt,omitempty"`
}

// VolumeSpec is what was asked for; Size is in MiB.
type VolumeSpec struct {
	Size       int64  `json:"size"`
	Region     string `json:"region"`
	Template   string `json:"template,omitempty"`
	Snapshot   string `json:"snapshot,omitempty"` // it was made from, as volume/snapshot
	Filesystem string `json:"filesystem"`
	Pool       string `json:"pool,omitempty"`      // where it is; empty: the host's first
	Ephemeral  bool   `json:"ephemeral,omitempty"` // deleted with the end of its attachment
}

// VolumeState is how the volume is now.
type VolumeState struct {
	AttachedTo  string       `json:"attachedTo,omitempty"`
	Attachments []Attachment `json:"attachments,omitempty"`
	Sizes       *Sizes       `json:"sizes,omitempty"`
	FrozenUntil string       `json:"frozenUntil,omitempty"`
	Move        *Move        `json:"move,omitempty"`
}

// Sizes are in bytes.
type Sizes struct {
	Wanted     int64  `json:"wanted"`
	Device     int64  `json:"device"`
	Filesystem int64  `json:"filesystem"` // 0 for filesystem "none"
	Allocated  int64  `json:"allocated"`
	Shared     int64  `json:"shared"`
	Pending    string `json:"pending,omitempty"` // what growth waits for

	Hydration *Hydration `json:"hydration,omitempty"` // while not all bytes lie in one place
}

// Hydration is how far a volume is that is used already while its bytes come. Sizes
// are in bytes.
type Hydration struct {
	Absent       int64  `json:"absent"` // at most
	Total        int64  `json:"total"`
	Layers       int    `json:"layers"`
	FailingSince string `json:"failingSince,omitempty"` // where the bytes come from does not answer
}

// Event is something that happened to a volume.
type Event struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Message string `json:"message"`
	Time    string `json:"time"`
}

// LiteVolume is an item of the paginated listing.
type LiteVolume struct {
	Metadata     Metadata  `json:"metadata"`
	Spec         LiteSpec  `json:"spec"`
	State        LiteState `json:"state"`
	Status       string    `json:"status"`
	TerminatedAt string    `json:"terminatedAt,omitempty"`
}

// LiteSpec is the part of the spec that listings show; Size is in MiB.
type LiteSpec struct {
	Size   int64  `json:"size"`
	Region string `json:"region"`
}

// LiteState is the part of the state that listings show.
type LiteState struct {
	AttachedTo string `json:"attachedTo,omitempty"`
}

// VolumeList is a page of volumes.
type VolumeList struct {
	Data []LiteVolume `json:"data"`
	Meta PageMeta     `json:"meta"`
}

// PageMeta describes a page. Total counts the workspace, whatever the filters.
type PageMeta struct {
	HasMore    bool   `json:"hasMore"`
	NextCursor string `json:"nextCursor"`
	Total      int    `json:"total"`
}

// VolumeRequest is the body of POST and PUT. Absent and null fields are not
// given; read-only fields and unknown ones are ignored.
type VolumeRequest struct {
	Metadata struct {
		Name        *string           `json:"name"`
		DisplayName *string           `json:"displayName"`
		Labels      map[string]string `json:"labels"`
		ExternalID  *string           `json:"externalId"`
	} `json:"metadata"`
	Spec struct {
		Size       json.RawMessage `json:"size"` // MiB
		Region     *string         `json:"region"`
		Template   *string         `json:"template"`
		Snapshot   *string         `json:"snapshot"`
		Filesystem *string         `json:"filesystem"`
		Pool       *string         `json:"pool"`
	} `json:"spec"`
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

func volumeMetadata(v engine.Volume) Metadata {
	return Metadata{
		Name: v.Name, DisplayName: v.DisplayName, Labels: v.Labels, ExternalID: v.ExternalID, Workspace: v.Workspace,
		CreatedAt: stamp(v.CreatedAt), UpdatedAt: stamp(v.UpdatedAt), CreatedBy: v.CreatedBy, UpdatedBy: v.UpdatedBy,
	}
}

func terminatedAt(v engine.Volume) string {
	if v.Phase == engine.Deleting {
		return stamp(v.UpdatedAt)
	}
	return ""
}

// volumeBody shows a volume; sizes may be nil.
func volumeBody(v engine.Volume, sizes *Sizes) Volume {
	b := Volume{
		Metadata: volumeMetadata(v),
		Spec:     VolumeSpec{Size: v.SizeMiB, Region: v.Region, Template: v.Template, Snapshot: v.ForkOf, Filesystem: string(v.Filesystem), Pool: v.Pool, Ephemeral: v.Ephemeral},
		Events:   make([]Event, len(v.Events)),
		State:    VolumeState{AttachedTo: v.AttachedTo(), Sizes: sizes, Move: moveBody(v.Move)},
		Status:   string(v.Status()), TerminatedAt: terminatedAt(v),
	}
	for i, e := range v.Events {
		b.Events[i] = eventBody(e)
	}
	if v.Frozen != nil {
		b.State.FrozenUntil = stamp(v.Frozen.Until)
	}
	for _, a := range v.Attachments {
		b.State.Attachments = append(b.State.Attachments, attachmentBody(a))
	}
	return b
}

func eventBody(e engine.Event) Event {
	return Event{Type: e.Type, Status: string(e.Status), Message: e.Message, Time: stamp(e.Time)}
}

func liteBody(v engine.Volume) LiteVolume {
	m := volumeMetadata(v)
	m.CreatedBy, m.UpdatedBy = "", ""
	return LiteVolume{
		Metadata: m, Spec: LiteSpec{Size: v.SizeMiB, Region: v.Region}, State: LiteState{AttachedTo: v.AttachedTo()},
		Status: string(v.Status()), TerminatedAt: terminatedAt(v),
	}
}

func hydrationBody(h *engine.Hydration) *Hydration {
	if h == nil {
		return nil
	}
	return &Hydration{Absent: h.Absent, Total: h.Total, Layers: h.Layers, FailingSince: optionalStamp(h.FailingSince)}
}

func sizesBody(s engine.Sizes) *Sizes {
	return &Sizes{Wanted: s.Wanted, Device: s.Device, Filesystem: s.Filesystem, Allocated: s.Allocated, Shared: s.Shared, Pending: s.Pending, Hydration: hydrationBody(s.Hydration)}
}

package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Volume is a volume as the API shows it. Sizes of the spec are MiB.
type Volume struct {
	Metadata VolumeMetadata `json:"metadata"`
	Spec     VolumeSpec     `json:"spec"`
	State    VolumeState    `json:"state,omitzero"`
	Status   string         `json:"status,omitempty"`
	Events   []VolumeEvent  `json:"events,omitempty"`
}

// VolumeMetadata names and describes a volume.
type VolumeMetadata struct {
	Name        string            `json:"name,omitempty"`
	DisplayName string            `json:"displayName,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	ExternalID  string            `json:"externalId,omitempty"`
	Workspace   string            `json:"workspace,omitempty"`
	CreatedAt   time.Time         `json:"createdAt,omitzero"`
	UpdatedAt   time.Time         `json:"updatedAt,omitzero"`
	CreatedBy   string            `json:"createdBy,omitempty"`
	UpdatedBy   string            `json:"updatedBy,omitempty"`
}

// VolumeSpec is what was asked for.
type VolumeSpec struct {
	Size       int64  `json:"size,omitempty"` // MiB
	Region     string `json:"region,omitempty"`
	Template   string `json:"template,omitempty"`
	Snapshot   string `json:"snapshot,omitempty"` // "volume/snapshot" or a snapshot's id
	Filesystem string `json:"filesystem,omitempty"`
	Pool       string `json:"pool,omitempty"`
	Ephemeral  bool   `json:"ephemeral,omitempty"` // read-only: deleted with the end of its attachment
}

// VolumeState is what is.
type VolumeState struct {
	AttachedTo  string       `json:"attachedTo,omitempty"`
	Attachments []Attachment `json:"attachments,omitempty"`
	Sizes       *Sizes       `json:"sizes,omitempty"`
	FrozenUntil time.Time    `json:"frozenUntil,omitzero"`
	Move        *Move        `json:"move,omitempty"`
}

// Move is how far a volume is on its way to another pool. Sizes are in bytes.
type Move struct {
	From      string    `json:"from"`
	To        string    `json:"to"`
	Phase     string    `json:"phase"` // copying, switching, leaving
	Size      int64     `json:"size"`  // of the device
	Done      int64     `json:"done"`  // of it, that is durable in the new pool
	Copied    int64     `json:"copied"`
	Failure   string    `json:"failure,omitempty"` // why the last step did not go through; it is tried again
	StartedAt time.Time `json:"startedAt"`
}

// Sizes are a volume's three sizes and its space, in bytes.
type Sizes struct {
	Wanted     int64  `json:"wanted"`
	Device     int64  `json:"device"`
	Filesystem int64  `json:"filesystem"`
	Allocated  int64  `json:"allocated"`
	Shared     int64  `json:"shared"`
	Pending    string `json:"pending,omitempty"` // what growth waits for

	Hydration *Hydration `json:"hydration,omitempty"` // nil: all bytes lie in one place
}

// Hydration is how far a volume is that is used already while its bytes come. Sizes
// are in bytes.
type Hydration struct {
	Absent       int64     `json:"absent"` // at most
	Total        int64     `json:"total"`
	Layers       int       `json:"layers"`
	FailingSince time.Time `json:"failingSince,omitzero"` // where the bytes come from does not answer
}

// VolumeEvent is something that happened to a volume.
type VolumeEvent struct {
	Type    string    `json:"type"`
	Status  string    `json:"status"`
	Message string    `json:"message"`
	Time    time.Time `json:"time"`
}

// VolumeChange is a change of a volume; nil fields keep their value.
type VolumeChange struct {
	DisplayName *string
	Labels      map[string]string // nil: keep; empty: none
	ExternalID  *string
	SizeMiB     *int64
}

// VolumeQuery selects volumes.
type VolumeQuery struct {
	Limit      int    // of a page; 0: the server's
	Cursor     string // of the page before
	Sort       string // "createdAt:desc", "createdAt:asc", "name:asc", "name:desc"
	Search     string
	Anchor     string // "end": the last page; createdAt sorts only
	ExternalID string
	Status     []string
	Labels     map[string]string
}

// VolumePage is one page of a listing.
type VolumePage struct {
	Data []Volume `json:"data"`
	Meta struct {
		HasMore    bool   `json:"hasMore"`
		NextCursor string `json:"nextCursor"`
		Total      int    `json:"total"`
	} `json:"meta"`
}

// CreateVolume makes a volume; it is usable and durable on return. With an
// idempotency key the same request again gets the same answer.
func (c *Client) CreateVolume(ctx context.Context, v Volume, idempotencyKey string) (Volume, error) {
	h := http.Header{}
	if idempotencyKey != "" {
		h.Set("Idempotency-Key", idempotencyKey)
	}
	var out Volume
	err := c.do(ctx, call{method: "POST", path: []string{"volumes"}, header: h, body: v}, &out)
	return out, err
}

// Volume finds a volume by name.
func (c *Client) Volume(ctx context.Context, name string) (Volume, error) {
	var out Volume
	err := c.do(ctx, call{method: "GET", path: []string{"volumes", name}}, &out)
	return out, err
}

// VolumeByExternalID finds the active volume with an external id.
func (c *Client) VolumeByExternalID(ctx context.Context, id string) (Volume, error) {
	var out Volume
	err := c.do(ctx, call{method: "GET", path: []string{"volumes", "by-external-id", id}}, &out)
	return out, err
}

// ListVolumes gives one page.
func (c *Client) ListVolumes(ctx context.Context, q VolumeQuery) (VolumePage, error) {
	var out VolumePage
	err := c.do(ctx, call{method: "GET", path: []string{"volumes"}, query: q.values()}, &out)
	return out, err
}

// Volumes walks all pages.
func (c *Client) Volumes(ctx context.Context, q VolumeQuery) iter.Seq2[Volume, error] {
	return func(yield func(Volume, error) bool) {
		for {
			page, err := c.ListVolumes(ctx, q)
			if err != nil {
				yield(Volume{}, err)
				return
			}
			for _, v := range page.Data {
				if !yield(v, nil) {
					return
				}
			}
			if !page.Meta.HasMore || page.Meta.NextCursor == "" {
				return
			}
			q.Cursor = page.Meta.NextCursor
		}
	}
}

func (q VolumeQuery) values() url.Values {
	v := url.Values{}
	set := func(key, value string) {
		if value != "" {
			v.Set(key, value)
		}
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	set("cursor", q.Cursor)
	set("sort", q.Sort)
	set("q", q.Search)
	set("anchor", q.Anchor)
	set("externalId", q.ExternalID)
	set("status", strings.Join(q.Status, ","))
	for k, label := range q.Labels {
		v.Add("label", k+"="+label)
	}
	return v
}

// UpdateVolume merges a change; growth that can happen now has happened on
// return, what is pending shows in State.Sizes.
func (c *Client) UpdateVolume(ctx context.Context, name string, ch VolumeChange) (Volume, error) {
	metadata, spec := map[string]any{}, map[string]any{}
	if ch.DisplayName != nil {
		metadata["displayName"] = *ch.DisplayName
	}
	if ch.Labels != nil {
		metadata["labels"] = ch.Labels
	}
	if ch.ExternalID != nil {
		metadata["externalId"] = *ch.ExternalID
	}
	if ch.SizeMiB != nil {
		spec["size"] = *ch.SizeMiB
	}
	var out Volume
	err := c.do(ctx, call{method: "PUT", path: []string{"volumes", name}, body: map[string]any{"metadata": metadata, "spec": spec}}, &out)
	return out, err
}

// SanitizeVolume copies the files of a detached volume that a guest has written into a
// fresh filesystem of a new volume, which this host may mount. size is in MiB, 0 for
// the old one's.
func (c *Client) SanitizeVolume(ctx context.Context, volume, name string, size int64) (Volume, error) {
	var out Volume
	body := struct {
		Name string `json:"name"`
		Size int64  `json:"size,omitempty"`
	}{name, size}
	err := c.do(ctx, call{method: "POST", path: []string{"volumes", volume, "sanitize"}, body: body}, &out)
	return out, err
}

// MoveVolume begins to move a detached volume to another pool; State.Move tells how far
// it is. A move to the pool where the volume is takes one that is under way back.
func (c *Client) MoveVolume(ctx context.Context, volume, pool string) (Volume, error) {
	var out Volume
	body := struct {
		Pool string `json:"pool"`
	}{pool}
	err := c.do(ctx, call{method: "POST", path: []string{"volumes", volume, "move"}, body: body}, &out)
	return out, err
}

// DeleteVolume deletes durably; the name is free on return.
func (c *Client) DeleteVolume(ctx context.Context, name string) (Volume, error) {
	var out Volume
	err := c.do(ctx, call{method: "DELETE", path: []string{"volumes", name}}, &out)
	return out, err
}

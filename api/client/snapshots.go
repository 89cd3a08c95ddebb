package client

import (
	"context"
	"iter"
	"net/http"
	"time"
)

// Snapshot is what a volume held at one moment. Sizes of the spec are MiB, of the
// state bytes.
type Snapshot struct {
	Metadata SnapshotMetadata `json:"metadata"`
	Spec     SnapshotSpec     `json:"spec"`
	State    SnapshotState    `json:"state"`
	Status   string           `json:"status"` // CREATING, READY, FAILED, DELETING
}

// SnapshotMetadata names and describes a snapshot.
type SnapshotMetadata struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels,omitempty"`
	Workspace string            `json:"workspace"`
	CreatedAt time.Time         `json:"createdAt"`
	CreatedBy string            `json:"createdBy,omitempty"`
}

// SnapshotSpec is what was asked for, and of what.
type SnapshotSpec struct {
	Volume      string `json:"volume"` // its name, when the snapshot was taken
	VolumeID    string `json:"volumeId"`
	Size        int64  `json:"size"` // MiB
	Filesystem  string `json:"filesystem"`
	Consistency string `json:"consistency"` // "crash" or "filesystem"
	Template    string `json:"template,omitempty"`
	Pool        string `json:"pool,omitempty"`
}

// SnapshotState is how the snapshot is now.
type SnapshotState struct {
	Promised         int64          `json:"promised"` // the most bytes that it can come to occupy alone
	HeldMilliseconds float64        `json:"heldMilliseconds"`
	Tainted          bool           `json:"tainted,omitempty"`
	Failure          string         `json:"failure,omitempty"`
	Space            *SnapshotSpace `json:"space,omitempty"` // nil in listings
}

// SnapshotSpace is what a snapshot occupies, in bytes.
type SnapshotSpace struct {
	Allocated int64  `json:"allocated"`
	Exclusive *int64 `json:"exclusive,omitempty"` // what deleting it frees; nil where the pool cannot tell
}

// NewSnapshot asks for a snapshot; the zero value is fine.
type NewSnapshot struct {
	Name        string // empty: the server makes one
	Labels      map[string]string
	Consistency string // "crash" (default) or "filesystem"
}

// CreateSnapshot keeps what a volume holds now; it is durable on return. With an
// idempotency key the same request again gets the same answer.
func (c *Client) CreateSnapshot(ctx context.Context, volume string, s NewSnapshot, idempotencyKey string) (Snapshot, error) {
	h := http.Header{}
	if idempotencyKey != "" {
		h.Set("Idempotency-Key", idempotencyKey)
	}
	var body struct {
		Metadata struct {
			Name   string            `json:"name,omitempty"`
			Labels map[string]string `json:"labels,omitempty"`
		} `json:"metadata"`
		Spec struct {
			Consistency string `json:"consistency,omitempty"`
		} `json:"spec"`
	}
	body.Metadata.Name, body.Metadata.Labels, body.Spec.Consistency = s.Name, s.Labels, s.Consistency
	var out Snapshot
	err := c.do(ctx, call{method: "POST", path: []string{"volumes", volume, "snapshots"}, header: h, body: body}, &out)
	return out, err
}

// Snapshot finds a snapshot of a volume by its name or id; with an empty volume by its
// id, also when its volume has been deleted.
func (c *Client) Snapshot(ctx context.Context, volume, snapshot string) (Snapshot, error) {
	var out Snapshot
	err := c.do(ctx, call{method: "GET", path: snapshotPath(volume, snapshot)}, &out)
	return out, err
}

// DeleteSnapshot deletes a snapshot, named as for Snapshot. Volumes that were made from
// it stay as they are.
func (c *Client) DeleteSnapshot(ctx context.Context, volume, snapshot string) (Snapshot, error) {
	var out Snapshot
	err := c.do(ctx, call{method: "DELETE", path: snapshotPath(volume, snapshot)}, &out)
	return out, err
}

func snapshotPath(volume, snapshot string) []string {
	if volume == "" {
		return []string{"snapshots", snapshot}
	}
	return []string{"volumes", volume, "snapshots", snapshot}
}

// Snapshots walks all pages of a volume's snapshots, or with an empty volume of all of
// the workspace, newest first.
func (c *Client) Snapshots(ctx context.Context, volume string, labels map[string]string) iter.Seq2[Snapshot, error] {
	path := []string{"snapshots"}
	if volume != "" {
		path = []string{"volumes", volume, "snapshots"}
	}
	q := VolumeQuery{Limit: 200, Labels: labels}
	return func(yield func(Snapshot, error) bool) {
		for {
			var page struct {
				Data []Snapshot `json:"data"`
				Meta struct {
					HasMore    bool   `json:"hasMore"`
					NextCursor string `json:"nextCursor"`
				} `json:"meta"`
			}
			if err := c.do(ctx, call{method: "GET", path: path, query: q.values()}, &page); err != nil {
				yield(Snapshot{}, err)
				return
			}
			for _, s := range page.Data {
				if !yield(s, nil) {
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

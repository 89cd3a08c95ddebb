package api

import (
	"encoding/json"
	"errors"
	"net/url"

	"holdfast/blockdev"
	"holdfast/engine"
)

// Snapshot is what a volume held at one moment.
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
	CreatedAt string            `json:"createdAt"`
	CreatedBy string            `json:"createdBy,omitempty"`
}

// SnapshotSpec is what was asked for, and of what; Size is in MiB.
type SnapshotSpec struct {
	Volume      string `json:"volume"` // its name, when the snapshot was taken
	VolumeID    string `json:"volumeId"`
	Size        int64  `json:"size"`
	Filesystem  string `json:"filesystem"`
	Consistency string `json:"consistency"`
	Template    string `json:"template,omitempty"`
	Pool        string `json:"pool,omitempty"` // where it is; empty: the host's first
}

// SnapshotState is how the snapshot is now. Sizes are in bytes.
type SnapshotState struct {
	Promised         int64          `json:"promised"` // the most that it can come to occupy alone
	HeldMilliseconds float64        `json:"heldMilliseconds"`
	Tainted          bool           `json:"tainted,omitempty"`
	Failure          string         `json:"failure,omitempty"`
	Space            *SnapshotSpace `json:"space,omitempty"` // not in listings
}

// SnapshotSpace is what a snapshot occupies, in bytes.
type SnapshotSpace struct {
	Allocated int64  `json:"allocated"`
	Exclusive *int64 `json:"exclusive,omitempty"` // what deleting it frees; absent where the pool cannot tell
}

// SnapshotList is a page of snapshots.
type SnapshotList struct {
	Data []Snapshot `json:"data"`
	Meta PageMeta   `json:"meta"`
}

// SnapshotRequest is the body of POST; it may be left out.
type SnapshotRequest struct {
	Metadata struct {
		Name   *string           `json:"name"`
		Labels map[string]string `json:"labels"`
	} `json:"metadata"`
	Spec struct {
		Consistency *string `json:"consistency"`
	} `json:"spec"`
}

func createSnapshot(c *call) error {
	volume, err := c.pathName("volume")
	if err != nil {
		return err
	}
	key, err := c.idempotencyKey()
	if err != nil {
		return err
	}
	var b SnapshotRequest
	if err := c.decodeOptional(&b); err != nil {
		return err
	}
	r := engine.CreateSnapshot{
		Workspace: c.workspace, Volume: volume, Name: value(b.Metadata.Name), Labels: b.Metadata.Labels,
		Consistency: engine.Consistency(value(b.Spec.Consistency)), Actor: c.principal.actor(), IdempotencyKey: key,
	}
	s, err := c.s.o.Engine.CreateSnapshot(c.r.Context(), r)
	if err != nil {
		return err
	}
	c.resource = s.Ref()
	return c.json(snapshotBody(s))
}

// pathSnapshot is the snapshot that the path names: by its name or id beside its
// volume, or by its id alone.
func (c *call) pathSnapshot() (engine.Snapshot, error) {
	text := c.r.PathValue("snapshot")
	c.resource = clip(text, 64)
	if c.r.PathValue("name") == "" {
		return c.s.o.Engine.Snapshot(c.workspace, blockdev.ID(text))
	}
	volume, err := c.pathName("volume")
	if err != nil {
		return engine.Snapshot{}, err
	}
	s, err := c.s.o.Engine.SnapshotOf(c.workspace, volume, text)
	if err == nil {
		c.resource = s.Ref()
	}
	return s, err
}

// getSnapshot also tells the snapshot's space. A pool that cannot tell it now is no
// reason to hide the snapshot.
func getSnapshot(c *call) error {
	s, err := c.pathSnapshot()
	if err != nil {
		return err
	}
	b := snapshotBody(s)
	if s.Phase == engine.SnapshotReady && s.Failure == "" {
		allocated, exclusive, err := c.s.o.Engine.SnapshotSpace(c.r.Context(), s)
		switch {
		case err == nil:
			b.State.Space = &SnapshotSpace{Allocated: allocated, Exclusive: &exclusive}
		case errors.Is(err, errors.ErrUnsupported):
			b.State.Space = &SnapshotSpace{Allocated: allocated}
		default:
			c.s.log.Warn("no sizes of a snapshot", "request", c.id, "snapshot", s.ID, "workspace", s.Workspace, "cause", err)
		}
	}
	return c.json(b)
}

func deleteSnapshot(c *call) error {
	s, err := c.pathSnapshot()
	if err != nil {
		return err
	}
	c.resource = s.Ref()
	if s, err = c.s.o.Engine.DeleteSnapshot(c.r.Context(), c.workspace, s.ID, c.principal.actor()); err != nil {
		return err
	}
	return c.json(snapshotBody(s))
}

// listSnapshots lists those of the volume in the path, or all of the workspace.
func listSnapshots(c *call) error {
	var q engine.SnapshotQuery
	if c.r.PathValue("name") != "" {
		volume, err := c.pathName("volume")
		if err != nil {
			return err
		}
		q.Volume = volume
	}
	v, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return invalid("query", "is not well-formed")
	}
	var errs [3]error
	q.Limit, errs[0] = listLimit(v)
	q.Sort, errs[1] = listSort(v.Get("sort"))
	q.Labels, errs[2] = listLabels(v["label"])
	if err := firstOf(errs[:]); err != nil {
		return err
	}
	binding := snapshotBinding(c.workspace, q)
	if text := v.Get("cursor"); text != "" {
		if q.After, err = c.s.openCursor(text, binding); err != nil {
			return err
		}
	}
	page, err := c.s.o.Engine.Snapshots(c.workspace, q)
	if err != nil {
		return err
	}
	list := SnapshotList{Data: make([]Snapshot, len(page.Snapshots)), Meta: PageMeta{Total: page.Total}}
	for i, s := range page.Snapshots {
		list.Data[i] = snapshotBody(s)
	}
	if page.Next != nil {
		list.Meta.HasMore, list.Meta.NextCursor = true, c.s.sealCursor(*page.Next, binding)
	}
	return c.json(list)
}

// snapshotBinding is what a cursor belongs to.
func snapshotBinding(workspace string, q engine.SnapshotQuery) []byte {
	b, err := json.Marshal(struct {
		Of, Workspace, Volume, Sort string
		Labels                      map[string]string
	}{"snapshots", workspace, q.Volume, string(q.Sort), q.Labels})
	if err != nil {
		panic("api: " + err.Error())
	}
	return b
}

func snapshotBody(s engine.Snapshot) Snapshot {
	return Snapshot{
		Metadata: SnapshotMetadata{ID: string(s.ID), Name: s.Name, Labels: s.Labels, Workspace: s.Workspace, CreatedAt: stamp(s.CreatedAt), CreatedBy: s.CreatedBy},
		Spec: SnapshotSpec{
			Volume: s.Volume, VolumeID: string(s.VolumeID), Size: s.SizeMiB, Filesystem: string(s.Filesystem), Consistency: string(s.Consistency),
			Template: s.Template, Pool: s.Pool,
		},
		State:  SnapshotState{Promised: s.Bytes, HeldMilliseconds: float64(s.Held.Microseconds()) / 1000, Tainted: s.Tainted, Failure: s.Failure},
		Status: string(s.Status()),
	}
}

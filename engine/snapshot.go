package engine

import (
	"encoding/json"
	"fmt"
	"maps"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// SnapshotPhase names the next step of a snapshot.
//
//	SnapshotTaking ─► SnapshotReady ─► SnapshotDeleting ─► (gone)
//	      └────────────────────────────────┘
type SnapshotPhase string

// The phases of a snapshot. One whose taking was cut is taken back: its moment has
// passed. Only when its image says already that it is ready it is.
const (
	SnapshotTaking   SnapshotPhase = "taking"
	SnapshotReady    SnapshotPhase = "ready"
	SnapshotDeleting SnapshotPhase = "deleting"
)

// Consistency is what a snapshot of a volume in use can be relied on for.
type Consistency string

const (
	// CrashConsistent is what a disk holds whose power failed: what was flushed is
	// there, and a journal recovers the rest.
	CrashConsistent Consistency = "crash"
	// FilesystemConsistent holds all that was written to files before, and needs no
	// recovery: the filesystem is flushed and frozen for the moment.
	FilesystemConsistent Consistency = "filesystem"
)

// Snapshot is a snapshot's record, and (as canonical JSON) its self-description
// beside the image. It outlives its volume.
type Snapshot struct {
	ID          blockdev.ID       `json:"id"`
	Sequence    uint64            `json:"sequence"` // of changes; the higher one is the truth
	Workspace   string            `json:"workspace"`
	Name        string            `json:"name"` // unique among the snapshots of its volume
	Labels      map[string]string `json:"labels,omitempty"`
	Volume      string            `json:"volume"` // name of the volume, when it was taken
	VolumeID    blockdev.ID       `json:"volumeId"`
	SizeMiB     int64             `json:"sizeMiB"` // of the device, at that moment
	Bytes       int64             `json:"bytes"`   // that it can come to occupy alone: the most that its volume's writes leave to it
	Filesystem  filesystem.Type   `json:"filesystem"`
	UUID        string            `json:"uuid,omitempty"` // of the filesystem
	Pool        string            `json:"pool,omitempty"` // where the image is; empty: the host's first
	Template    string            `json:"template,omitempty"`
	Revision    blockdev.ID       `json:"revision,omitempty"`
	Tainted     bool              `json:"tainted,omitempty"`    // raw blocks of the volume had been writable by a tenant
	GuestMiB    int64             `json:"guestMiB,omitempty"`   // as in Volume
	CheckFirst  bool              `json:"checkFirst,omitempty"` // as in Volume
	Consistency Consistency       `json:"consistency"`
	Held        time.Duration     `json:"held,omitempty"` // how long the volume's writers waited
	Phase       SnapshotPhase     `json:"phase"`
	Failure     string            `json:"failure,omitempty"` // a permanent error: shows as FAILED
	CreatedAt   time.Time         `json:"createdAt"`
	UpdatedAt   time.Time         `json:"updatedAt"`
	CreatedBy   string            `json:"createdBy,omitempty"`
	UpdatedBy   string            `json:"updatedBy,omitempty"`
}

// SnapshotStatus is a phase in the words of the wire.
type SnapshotStatus string

const (
	SnapshotStatusCreating SnapshotStatus = "CREATING"
	SnapshotStatusReady    SnapshotStatus = "READY"
	SnapshotStatusFailed   SnapshotStatus = "FAILED"
	SnapshotStatusDeleting SnapshotStatus = "DELETING"
)

// Status tells the snapshot's state.
func (s Snapshot) Status() SnapshotStatus {
	switch {
	case s.Phase == SnapshotDeleting:
		return SnapshotStatusDeleting
	case s.Failure != "":
		return SnapshotStatusFailed
	case s.Phase == SnapshotReady:
		return SnapshotStatusReady
	}
	return SnapshotStatusCreating
}

// Ref is how a snapshot is named from outside of its volume: "volume/snapshot".
func (s Snapshot) Ref() string { return s.Volume + "/" + s.Name }

// clone makes a copy that can be changed: snapshots in the catalog never are.
func (s Snapshot) clone() Snapshot {
	s.Labels = maps.Clone(s.Labels)
	return s
}

// CreateSnapshot asks for a snapshot of a volume.
type CreateSnapshot struct {
	Workspace      string
	Volume         string // its name
	Name           string // empty: a name is made ("snapshot-" and 8 hex digits)
	Labels         map[string]string
	Consistency    Consistency // empty: CrashConsistent
	Actor          string
	IdempotencyKey string // as in CreateVolume
}

// describeSnapshot is the self-description that stands beside the image.
func describeSnapshot(s Snapshot) ([]byte, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("describe snapshot %s: %w", s.ID, err)
	}
	return b, nil
}

func parseSnapshot(b []byte) (Snapshot, error) {
	var s Snapshot
	if err := json.Unmarshal(b, &s); err != nil {
		return Snapshot{}, fmt.Errorf("snapshot description: %w", err)
	}
	if !s.ID.Valid() || !s.VolumeID.Valid() || s.Workspace == "" || s.Name == "" || s.Volume == "" || s.SizeMiB < 1 || !s.Filesystem.Valid() {
		return Snapshot{}, fmt.Errorf("snapshot description of %s: fields are missing", s.ID)
	}
	return s, nil
}

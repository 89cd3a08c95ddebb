package engine

import (
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// CreateVolume asks for a volume. Workspace and Actor come from the principal,
// never from a body.
type CreateVolume struct {
	Workspace      string
	Name           string // empty: a name is made ("volume-" and 8 hex digits)
	DisplayName    string
	Labels         map[string]string
	ExternalID     string
	Region         string // empty: the default
	Template       string // "name", "name:latest", "name:N"; empty: blank
	Snapshot       string `json:",omitempty"` // "volume/snapshot" or a snapshot's id: a fork of it
	SizeMiB        *int64 // nil: the template's default, the snapshot's size, else 1024
	Filesystem     string // empty: ext4
	Pool           string // empty: as the host's policy has it
	Ephemeral      bool   // deleted with the end of its last attachment
	Actor          string
	IdempotencyKey string // same key, same request: same answer for 24 h; another request: ErrConflict
}

// ChangeVolume is a PUT: nil fields keep their value.
type ChangeVolume struct {
	DisplayName *string
	Labels      map[string]string // nil: keep; empty: none
	ExternalID  *string
	SizeMiB     *int64
	Region      *string // must equal the volume's
	Template    *string // must equal, or resolve to, the volume's
	Filesystem  *string // must equal the volume's
	Snapshot    *string // must equal the volume's
	Actor       string
}

// AttachVolume asks for an attachment.
type AttachVolume struct {
	Holder    string // "sandbox:NAME" or "agent:NAME"
	Target    attach.Target
	MountPath string
	ReadOnly  bool
	Force     bool // take the volume from conflicting holders, as ForceDetach does
	Limits    blockdev.Limits
	Ephemeral *EphemeralVolume // nil: the volume is there
	Actor     string
}

// Sort is the order of a listing.
type Sort string

const (
	NewestFirst Sort = "createdAt:desc"
	OldestFirst Sort = "createdAt:asc"
	NameUp      Sort = "name:asc"
	NameDown    Sort = "name:desc"
)

// Query selects volumes of one workspace.
type Query struct {
	Sort       Sort              // empty: NewestFirst
	Search     string            // lower-cased substring of name, display name, label keys and values; empty: all
	ExternalID string            // exact; empty: all
	Statuses   []Status          // empty: all
	Labels     map[string]string // all must match
	After      *Position         // the last item of the page before; nil: from the start
	Tail       bool              // the last page instead (createdAt sorts only)
	Limit      int               // at most this many; 0: no limit
}

// Position is a place in a listing: the item that was last on a page.
type Position struct {
	CreatedAt time.Time   `json:"c"`
	Name      string      `json:"n"`
	ID        blockdev.ID `json:"i"`
}

// Page is one page of a listing.
type Page struct {
	Volumes []Volume
	Next    *Position // nil: this was the last page
	Total   int       // volumes of the workspace, whatever the filters
}

// Quota bounds a workspace; 0 is no bound.
type Quota struct {
	Volumes    int64 `json:"volumes"`
	MiB        int64 `json:"mib"`
	LargestMiB int64 `json:"largestMiB"`
	Snapshots  int64 `json:"snapshots,omitempty"`
}

// PoolStatus is a pool's space and promises, in bytes.
type PoolStatus struct {
	Name        string
	Backend     string
	Unavailable string // why it is not open; the rest is what is promised there
	Capacity    blockdev.Capacity
	Provisioned int64   // promised to volumes
	Other       int64   // held by what is not a volume (templates, sources, staging, trash)
	Reserve     int64   // kept free for deletes and metadata
	Ratio       float64 // overprovision
	Available   int64   // what can still be promised
	Shared      int64
	Volumes     int
	Snapshots   int
	Quarantined []blockdev.Quarantine
}

package templates

import (
	"errors"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// Sentinels. Errors carry a text that a caller of the API can act on.
var (
	ErrNotFound     = errors.New("template or version not found")
	ErrInvalid      = errors.New("invalid template request")
	ErrArchive      = errors.New("archive refused") // names the entry and the rule
	ErrUploadGone   = errors.New("upload URL is not valid")
	ErrLastRevision = errors.New("Cannot delete the only version") //nolint:staticcheck // the contract's own words
	ErrNoSpace      = errors.New("pool is full")
	ErrTooSmall     = errors.New("size is too small for the template")
	ErrInUse        = errors.New("template is in use")
	ErrBusy         = errors.New("too many uploads at once") // 429: try again later
	ErrPinned       = errors.New("version is pinned")
	ErrDamaged      = errors.New("version is damaged")
	ErrChunks       = errors.New("chunks of the tree are missing") // send them, or a plain archive
	ErrRemote       = errors.New("version is remote")              // its bytes are far away: what needs all of them here is refused
)

// RevisionStatus is the state of a revision, in the contract's words.
type RevisionStatus string

const (
	Created RevisionStatus = "CREATED" // an upload URL was given out
	Ready   RevisionStatus = "READY"
	Failed  RevisionStatus = "FAILED"
)

// Revision is one immutable image of a template.
type Revision struct {
	ID           blockdev.ID    `json:"id"`
	Workspace    string         `json:"workspace"`
	Template     string         `json:"template"`
	Name         string         `json:"name"`   // the number as text, or the ?version= given
	Number       int            `json:"number"` // 1, 2, 3, ...
	Status       RevisionStatus `json:"status"`
	Failure      string         `json:"failure,omitempty"`
	Digest       string         `json:"digest,omitempty"`     // "sha256:..." of the uploaded archive
	TreeDigest   string         `json:"treeDigest,omitempty"` // of what it holds: tree.Tree.Identity; empty for old ones
	Family       blockdev.ID    `json:"family,omitempty"`     // the first of the revisions that this one shares blocks with; empty: itself
	ContentBytes int64          `json:"contentBytes"`         // sizes of its files
	MinimumBytes int64          `json:"minimumBytes"`         // the smallest volume that holds it (ext4)
	ImageBytes   int64          `json:"imageBytes"`           // size of its own image
	Entries      int64          `json:"entries"`              // inodes
	DataBytes    int64          `json:"dataBytes"`            // what the contents occupy, in blocks of 4 KiB
	LongestLink  int64          `json:"longestLink"`          // bytes of the longest symbolic link's text
	CreatedAt    time.Time      `json:"createdAt"`
	ReadyAt      time.Time      `json:"readyAt,omitzero"`
	CreatedBy    string         `json:"createdBy,omitempty"`
	RollbackOf   int            `json:"rollbackOf,omitempty"`  // number of the revision whose image this is again
	Pinned       *Pin           `json:"pinned,omitempty"`      // nil: retention may take it
	ImageDigest  string         `json:"imageDigest,omitempty"` // of the image as published; see extent.Digester
	VerifiedAt   time.Time      `json:"verifiedAt,omitzero"`   // when the image was last held against it
	Damaged      bool           `json:"damaged,omitempty"`     // READY once; its image is not what was published, or gone
	Remote       *Remote        `json:"remote,omitempty"`      // nil: its bytes are in the pool. What it points to is never changed
}

// Remote says where the bytes of a revision are that are far away. Its image in the
// pool reads them as they are wanted; its ImageBytes is the smallest volume.
type Remote struct {
	Manifest   string          `json:"manifest"` // URLs
	Image      string          `json:"image"`
	Chunks     string          `json:"chunks"` // SHA-256 of what the bytes are, "sha256:..."
	Filesystem filesystem.Type `json:"filesystem"`
}

// Template is a named line of revisions.
type Template struct {
	Workspace      string            `json:"workspace"`
	Name           string            `json:"name"`
	DisplayName    string            `json:"displayName,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`
	Description    string            `json:"description,omitempty"`
	DefaultSizeMiB int64             `json:"defaultSizeMiB,omitempty"`
	Retention      Retention         `json:"retention,omitzero"`
	NextNumber     int               `json:"nextNumber"`
	CreatedAt      time.Time         `json:"createdAt"`
	UpdatedAt      time.Time         `json:"updatedAt"`
	CreatedBy      string            `json:"createdBy,omitempty"`
	UpdatedBy      string            `json:"updatedBy,omitempty"`
	Revisions      []Revision        `json:"revisions"`        // oldest first
	Events         []Event           `json:"events,omitempty"` // the last ones, oldest first
}

// Latest is the newest READY revision, or nil. It never moves backwards by
// itself: when the newest one is damaged there is none, until somebody rolls
// back, pushes again or deletes the damaged one.
func (t Template) Latest() *Revision {
	if v := t.newestOf(Revision.hadImage); v != nil && v.Status == Ready {
		return v
	}
	return nil
}

// Change is what a PUT or POST asks for; nil fields keep their value.
type Change struct {
	DisplayName    *string
	Labels         map[string]string // nil: keep
	Description    *string
	DefaultSizeMiB *int64
	KeepVersions   *int // of Retention; 0: as the node has it
	KeepDays       *int
	Actor          string
}

// SourceSpec asks for an image to clone a volume from.
type SourceSpec struct {
	Filesystem filesystem.Type `json:"filesystem"`         // not None
	Size       int64           `json:"size"`               // bytes, of the volume
	Revision   blockdev.ID     `json:"revision,omitempty"` // empty: a blank
	Pool       string          `json:"pool,omitempty"`     // where; empty: with the revisions
}

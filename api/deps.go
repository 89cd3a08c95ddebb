package api

import (
	"context"
	"io"
	"net/http"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
	"holdfast/engine"
	"holdfast/templates"
	"holdfast/templates/delta"
)

// Engine is what the server needs of the volumes. engine.Engine is one.
type Engine interface {
	CreateVolume(ctx context.Context, r engine.CreateVolume) (engine.Volume, error)
	Volume(workspace, name string) (engine.Volume, error)
	VolumeByExternalID(workspace, externalID string) (engine.Volume, error)
	// Socket is where a worker serves an attachment's volume on this host; "" for others.
	Socket(v engine.Volume, a engine.Attachment) string
	Sizes(ctx context.Context, v engine.Volume) (engine.Sizes, error)
	List(workspace string, q engine.Query) (engine.Page, error)
	ChangeVolume(ctx context.Context, workspace, name string, c engine.ChangeVolume) (engine.Volume, error)
	DeleteVolume(ctx context.Context, workspace, name, actor string) (engine.Volume, error)
	Attach(ctx context.Context, workspace, name string, r engine.AttachVolume) (engine.Attachment, error)
	Detach(ctx context.Context, workspace, name, id, actor string) (engine.Attachment, error)
	SetLimits(ctx context.Context, workspace, name, id string, l blockdev.Limits, actor string) (engine.Attachment, error)
	Enforcement(a engine.Attachment) blockdev.Enforcement
	Remains(a engine.Attachment) string
	Launch(ctx context.Context, v engine.Volume, a engine.Attachment) (*attach.Launch, error)
	Stats(ctx context.Context, workspace, name string) (engine.Stats, error)
	IO(ctx context.Context, workspace, name string) (engine.IO, error)
	IOInUse(ctx context.Context, workspace string, limit int) (all []engine.IO, more bool, err error)
	SanitizeVolume(ctx context.Context, workspace, name string, r engine.SanitizeVolume) (engine.Volume, error)
	CreateSnapshot(ctx context.Context, r engine.CreateSnapshot) (engine.Snapshot, error)
	Snapshot(workspace string, id blockdev.ID) (engine.Snapshot, error)
	SnapshotOf(workspace, volume, name string) (engine.Snapshot, error)
	Snapshots(workspace string, q engine.SnapshotQuery) (engine.SnapshotPage, error)
	SnapshotSpace(ctx context.Context, s engine.Snapshot) (allocated, exclusive int64, err error)
	DeleteSnapshot(ctx context.Context, workspace string, id blockdev.ID, actor string) (engine.Snapshot, error)
	MoveVolume(ctx context.Context, workspace, name, pool, actor string) (engine.Volume, error)
	TrimVolume(ctx context.Context, workspace, name string) (engine.TrimResult, error)
	FreezeVolume(ctx context.Context, workspace, name string, timeout time.Duration, actor string) (engine.Freeze, error)
	ThawVolume(ctx context.Context, workspace, name, actor string) (was bool, err error)
	ForceDetach(ctx context.Context, workspace, name, id, actor string) (engine.Attachment, error)
	CaptureVolume(ctx context.Context, workspace, name string, r engine.CaptureVolume) (engine.CaptureResult, error)
	ListDir(ctx context.Context, workspace, name, dir string) ([]filesystem.Entry, error)
	ReadFile(ctx context.Context, workspace, name, file string, w io.Writer) error
	SetQuota(ctx context.Context, workspace string, q engine.Quota) error
	Quota(workspace string) engine.Quota
	Pools(ctx context.Context) ([]engine.PoolStatus, error)
	Happenings(ctx context.Context, workspace string, after uint64, limit int, wait <-chan struct{}) (found []engine.Happening, next uint64, lost bool)
	VolumesOf(workspace string) map[blockdev.ID][]string
}

// Library is what the server needs of the templates. templates.Library is one.
type Library interface {
	Put(ctx context.Context, workspace, name string, c templates.Change, create bool) (t templates.Template, created bool, err error)
	Template(workspace, name string) (templates.Template, error)
	List(workspace string) ([]templates.Template, error)
	Delete(ctx context.Context, workspace, name, actor string) (templates.Template, error)
	DeleteRevision(ctx context.Context, workspace, name, version, actor string) (templates.Template, error)
	Pin(ctx context.Context, workspace, name, version, actor string) (templates.Revision, error)
	Unpin(ctx context.Context, workspace, name, version, actor string) (templates.Revision, error)
	Rollback(ctx context.Context, workspace, name, version, actor string) (templates.Revision, error)
	Verify(ctx context.Context, workspace, name, version string) (templates.Revision, error)
	Sources() map[blockdev.ID][]templates.SourceSpec
	BeginUpload(ctx context.Context, workspace, name, version, actor string) (pathAndQuery string, err error)
	Known(ctx context.Context, u templates.Upload, query io.Reader) (delta.Answer, error)
	IngestDelta(ctx context.Context, u templates.Upload, length int64, body io.Reader) (templates.Revision, error)
	Diff(ctx context.Context, workspace, name, from, to string, begin func(from, to templates.Revision), each func(templates.Difference) error) error
	Archive(ctx context.Context, workspace, name, version string, begin func(v templates.Revision, length int64) io.Writer) error
	Ingest(ctx context.Context, u templates.Upload, length int64, body io.Reader) (templates.Revision, error)
	Import(ctx context.Context, workspace string, i templates.Import) (templates.Revision, error)
	Publish(ctx context.Context, workspace, name string, p templates.Publication, begin func(v templates.Revision) io.Writer) error
	Register(ctx context.Context, workspace string, r templates.Registration) (templates.Revision, error)
	Relocate(ctx context.Context, workspace string, r templates.Relocation) (templates.Revision, error)
	RelocateImage(ctx context.Context, id blockdev.ID, manifest string) error
}

// Role is what a principal may do; each includes those before it.
type Role string

// The roles.
const (
	Reader Role = "reader"
	Writer Role = "writer"
	Admin  Role = "admin"
)

func (r Role) rank() int {
	switch r {
	case Reader:
		return 1
	case Writer:
		return 2
	case Admin:
		return 3
	}
	return 0
}

// Principal is who makes a request.
type Principal struct {
	KeyID        string
	Name         string
	Role         Role
	Workspace    string // of the key; empty for a control-plane key without one
	ControlPlane bool   // may act for any workspace, and on the node
}

// actor is how the principal shows in createdBy and in the audit log.
func (p Principal) actor() string {
	if p.Name != "" {
		return p.Name
	}
	return p.KeyID
}

// Access keeps API keys and workspaces and finds the principal of a request.
type Access interface {
	// Authenticate finds the principal of a request. ErrUnauthorized for missing
	// or invalid credentials.
	Authenticate(r *http.Request) (Principal, error)
	// IssueToken trades an API key for an access token that Authenticate takes.
	IssueToken(secret string) (token string, expires time.Duration, err error)

	CreateKey(ctx context.Context, k NewKey) (key Key, secret string, err error)
	Keys(workspace string) ([]Key, error) // empty: all
	RevokeKey(ctx context.Context, workspace, id, actor string) (Key, error)

	PutWorkspace(ctx context.Context, name string, displayName *string, actor string) (Workspace, error)
	Workspace(name string) (Workspace, error)
	Workspaces() ([]Workspace, error)
}

// NewKey asks for an API key.
type NewKey struct {
	Name         string
	Workspace    string
	Role         Role
	ControlPlane bool
	ExpiresAt    time.Time
	Actor        string
}

// Key is an API key without its secret.
type Key struct {
	ID           string
	Name         string
	Prefix       string
	Workspace    string
	Role         Role
	ControlPlane bool
	CreatedAt    time.Time
	CreatedBy    string
	ExpiresAt    time.Time
	RevokedAt    time.Time
}

// Workspace is a tenant.
type Workspace struct {
	ID          string
	Name        string
	DisplayName string
	CreatedAt   time.Time
	UpdatedAt   time.Time
}

// Entry is one line of the audit log: a mutation that was asked for, by whom,
// and how it ended.
type Entry struct {
	Time      time.Time
	Request   string // id
	Workspace string
	KeyID     string
	Principal string
	Action    string // "volume.create"
	Resource  string // name
	Remote    string // address; "local" for the socket
	Status    int    // HTTP
	Error     string // the error word, empty when it went through
}

// Auditor keeps the audit log.
type Auditor interface {
	Record(ctx context.Context, e Entry) error
	// Recent gives the newest entries of a workspace (empty: all), newest first.
	Recent(ctx context.Context, workspace string, limit int) ([]Entry, error)
}

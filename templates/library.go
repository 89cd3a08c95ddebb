package templates

import (
	"context"
	"io"
	"log/slog"
	"time"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// Space sets pool bytes aside while an archive is staged and built.
type Space interface {
	Reserve(bytes int64, what string) (release func(), err error)
}

// Options are what a Library is made of; all required but the limits.
type Options struct {
	Store   *metadata.Store
	SideLog *metadata.SideLog // template heads, so that a rebuild finds templates without revisions
	Pool    blockdev.Backend
	Space   Space
	Staging string // directory in the pool for uploads; emptied at Open
	Mounts  string // directory for the builder's private mounts
	Secret  []byte // signs upload URLs
	Log     *slog.Logger
	Now     func() time.Time

	MaxArchiveBytes int64 // 0: 64 GiB
	MaxEntries      int64 // 0: 2,000,000
	MaxUploads      int   // at once; 0: 4
	MaxSources      int   // cached sized images; 0: 64
	KeepRevisions   int   // per template; 0: 100
}

// Library keeps templates and sources. It is safe for concurrent use.
type Library struct{ o Options }

// Open reads all records, adopts or removes what a crash left, empties staging.
func Open(ctx context.Context, o Options) (*Library, error) { return &Library{o: o}, nil }

// Put creates or changes a template; created tells which.
func (l *Library) Put(ctx context.Context, workspace, name string, c Change, create bool) (t Template, created bool, err error) {
	return Template{}, false, ErrNotFound
}

// Template finds one; List gives all of a workspace by name.
func (l *Library) Template(workspace, name string) (Template, error) { return Template{}, ErrNotFound }

// List gives all templates of a workspace, by name.
func (l *Library) List(workspace string) ([]Template, error) { return nil, nil }

// Delete removes a template and its revisions; volumes made from it stay.
func (l *Library) Delete(ctx context.Context, workspace, name, actor string) (Template, error) {
	return Template{}, ErrNotFound
}

// DeleteRevision removes one revision; ErrLastRevision for the only one.
func (l *Library) DeleteRevision(ctx context.Context, workspace, name, version, actor string) (Template, error) {
	return Template{}, ErrNotFound
}

// BeginUpload records a CREATED revision and gives the path and query of its
// upload URL ("/uploads/ID?expires=...&signature=..."), to be put behind the
// server's own base. version names the revision; empty: its number.
func (l *Library) BeginUpload(ctx context.Context, workspace, name, version, actor string) (pathAndQuery string, err error) {
	return "", ErrNotFound
}

// Ingest reads an archive for an upload that BeginUpload gave out, builds the
// image and makes the revision READY, durably, before it returns. length is the
// Content-Length (-1: unknown, which is refused as ErrInvalid).
// ErrUploadGone for a forged, expired or used URL.
func (l *Library) Ingest(ctx context.Context, uploadID, expires, signature string, length int64, body io.Reader) (Revision, error) {
	return Revision{}, ErrUploadGone
}

// Resolve finds a READY revision by "name", "name:latest", "name:N" or "name:version".
func (l *Library) Resolve(ctx context.Context, workspace, ref string) (Template, Revision, error) {
	return Template{}, Revision{}, ErrNotFound
}

// Source gives a published image of exactly s.Size bytes to clone, made if the
// cache has none. It is not removed until release is called.
func (l *Library) Source(ctx context.Context, s SourceSpec) (id blockdev.ID, release func(), err error) {
	return "", nil, ErrNotFound
}

// Bytes tells the pool bytes that revisions and sources occupy.
func (l *Library) Bytes() int64 { return 0 }

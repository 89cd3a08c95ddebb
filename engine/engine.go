package engine

import (
	"context"
	"io"
	"log/slog"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
)

// Options are what an Engine is made of. Every field without a note is required.
type Options struct {
	Store       *metadata.Store
	Pool        blockdev.Backend
	PoolName    string
	Library     Library
	Stage       Stage
	Filesystems Filesystems
	Attachers   map[string]attach.Attacher // by target type
	Ledger      *Ledger
	Log         *slog.Logger

	Regions       []string         // allowed; empty: any text
	DefaultRegion string           // for requests without one
	MaxSizeMiB    int64            // largest volume; 0: 64 TiB
	Now           func() time.Time // nil: time.Now
}

// Engine is the life of the volumes of one node. It is safe for concurrent use.
type Engine struct{ o Options }

// New reads all records, recomputes the ledger and is ready to Reconcile.
func New(ctx context.Context, o Options) (*Engine, error) { return &Engine{o: o}, nil }

// Reconcile compares the records with the pool and the kernel and repairs what
// differs: interrupted creates and deletes are finished, images that explain
// themselves and have no record are adopted, attachments whose sandbox is gone
// are released. The daemon calls it at start, before it listens.
func (e *Engine) Reconcile(ctx context.Context) error { return nil }

// Run repeats in the background what is to be retried (pending growth,
// detaching, probes of sandboxes) until ctx ends.
func (e *Engine) Run(ctx context.Context) error { return nil }

// CreateVolume returns when the volume is usable and durable.
func (e *Engine) CreateVolume(ctx context.Context, r CreateVolume) (Volume, error) {
	return Volume{}, ErrUnavailable
}

// Volume finds an active volume by name.
func (e *Engine) Volume(workspace, name string) (Volume, error) { return Volume{}, ErrNotFound }

// VolumeByExternalID finds the active volume with an external id.
func (e *Engine) VolumeByExternalID(workspace, externalID string) (Volume, error) {
	return Volume{}, ErrNotFound
}

// Sizes asks the pool and the filesystem for a volume's sizes.
func (e *Engine) Sizes(ctx context.Context, v Volume) (Sizes, error) { return Sizes{}, ErrNotFound }

// List gives one page of a workspace's volumes.
func (e *Engine) List(workspace string, q Query) (Page, error) { return Page{}, nil }

// ChangeVolume merges a change. Growth that can happen now has happened on
// return; what is pending shows in Sizes.
func (e *Engine) ChangeVolume(ctx context.Context, workspace, name string, c ChangeVolume) (Volume, error) {
	return Volume{}, ErrUnavailable
}

// DeleteVolume durably deletes; the answer's phase is Deleting and the name is free.
func (e *Engine) DeleteVolume(ctx context.Context, workspace, name, actor string) (Volume, error) {
	return Volume{}, ErrUnavailable
}

// Attach returns when the volume is visible in the sandbox.
func (e *Engine) Attach(ctx context.Context, workspace, name string, r AttachVolume) (Attachment, error) {
	return Attachment{}, ErrUnavailable
}

// Detach returns when the volume is no longer visible in the sandbox, what was
// written is durable and the device is released. Unknown attachments: ErrNotFound.
func (e *Engine) Detach(ctx context.Context, workspace, name, id, actor string) (Attachment, error) {
	return Attachment{}, ErrUnavailable
}

// ListDir lists a directory of a detached volume without mounting it.
func (e *Engine) ListDir(ctx context.Context, workspace, name, dir string) ([]filesystem.Entry, error) {
	return nil, ErrUnavailable
}

// ReadFile writes a file of a detached volume to w without mounting the volume.
func (e *Engine) ReadFile(ctx context.Context, workspace, name, file string, w io.Writer) error {
	return ErrUnavailable
}

// SetQuota bounds a workspace, durably; Quota tells the bounds.
func (e *Engine) SetQuota(ctx context.Context, workspace string, q Quota) error {
	return ErrUnavailable
}

// Quota tells the bounds of a workspace; the zero Quota is none.
func (e *Engine) Quota(workspace string) Quota { return Quota{} }

// Pools tells the pools' space and promises.
func (e *Engine) Pools(ctx context.Context) ([]PoolStatus, error) { return nil, nil }

// Attachments counts the attachments of all volumes, by target type.
func (e *Engine) Attachments() map[string]int { return nil }

package engine

import (
	"context"
	"io"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/templates"
)

// Library gives images to clone from. templates.Library is one.
type Library interface {
	// Resolve finds a READY revision by "name", "name:latest" or "name:N" (or a
	// version's name) in a workspace. templates.ErrNotFound.
	Resolve(ctx context.Context, workspace, ref string) (templates.Template, templates.Revision, error)
	// Hydrate makes a draft dst of exactly s.Size bytes that holds a clean
	// filesystem: a formatted blank, or a revision's content. Copy-on-write where
	// the pool can, a copy of the data extents otherwise. A draft that is there is
	// made anew. templates.ErrTooSmall when the revision does not fit.
	Hydrate(ctx context.Context, dst blockdev.ID, s templates.SourceSpec) error
	// Capture makes a revision of what c.Clone gives it.
	Capture(ctx context.Context, workspace string, c templates.Capture) (templates.Captured, error)
	// Copy makes a draft with the data of a published image that nobody has open.
	Copy(ctx context.Context, dst, src blockdev.ID, size int64) error
}

// Stage mounts volumes on this host where no tenant can reach them. attach.Stage is one.
type Stage interface {
	// Mount mounts the endpoint's filesystem once and tells where; mounted
	// already is success. nosuid, nodev.
	Mount(ctx context.Context, id blockdev.ID, e blockdev.Endpoint, t filesystem.Type) (dir string, err error)
	// Unmount flushes and unmounts; it returns nil only when the kernel has let
	// the filesystem go (no namespace, no open file holds it). Not mounted is
	// success; blockdev.ErrBusy otherwise.
	Unmount(ctx context.Context, id blockdev.ID) error
	// Shutdown makes the filesystem refuse everything from now on, for whoever has
	// it open; with flush what is dirty is written first. Not mounted, or shut down
	// already, is success. errors.ErrUnsupported, and nothing has changed, for types
	// that cannot.
	Shutdown(ctx context.Context, id blockdev.ID, flush bool) error
	// Abandon unmounts without a flush, whoever has files open, and returns nil when
	// the kernel has let go of the device; blockdev.ErrBusy while it has not.
	Abandon(ctx context.Context, id blockdev.ID, device string) error
	// Mounted tells where the volume is mounted now, "" when it is not.
	Mounted(ctx context.Context, id blockdev.ID) (dir string, err error)
	// Volumes tells all that are mounted now, and where.
	Volumes(ctx context.Context) (map[blockdev.ID]string, error)
}

// Filesystems is what the engine needs of filesystems. filesystem.Tools is one.
type Filesystems interface {
	Upkeep
	// Identify gives a clean, unmounted filesystem its own UUID; durable when the
	// image is flushed (Publish).
	Identify(ctx context.Context, path string, t filesystem.Type, uuid string) error
	// Size reads the size in bytes of an unmounted filesystem from its superblock;
	// SizeMounted asks the one that is mounted at dir.
	Size(ctx context.Context, path string, t filesystem.Type) (int64, error)
	// IdentifyIn, SizeIn, ListDirIn and ReadFileIn are the same of an image that is no
	// file of this host.
	IdentifyIn(ctx context.Context, image filesystem.Image, size int64, t filesystem.Type, uuid string) error
	SizeIn(ctx context.Context, image io.ReaderAt, t filesystem.Type) (int64, error)
	ListDirIn(ctx context.Context, image io.ReaderAt, t filesystem.Type, dir string) ([]filesystem.Entry, error)
	ReadFileIn(ctx context.Context, image io.ReaderAt, t filesystem.Type, file string, w io.Writer) error
	SizeMounted(ctx context.Context, dir string, t filesystem.Type) (int64, error)
	// Grow grows an unmounted filesystem to its device; the checker runs first and
	// repairs what an interrupted growth left. filesystem.ErrNeedsMount for types
	// that only grow mounted.
	Grow(ctx context.Context, path string, t filesystem.Type) error
	// Preen makes an unmounted ext4 that a guest has written consistent, as far as that
	// is nobody's decision. filesystem.ErrForeign when the device is not that ext4 as a
	// whole, filesystem.ErrNeedsRepair when its owner must decide.
	Preen(ctx context.Context, path string) error
	// GrowMounted grows the filesystem mounted at dir to its device.
	// filesystem.ErrCannotGrowMounted, with the reason, where the kernel refuses.
	GrowMounted(ctx context.Context, dir string, t filesystem.Type) error
	// ListDir and ReadFile read an unmounted filesystem without mounting it.
	ListDir(ctx context.Context, path string, t filesystem.Type, dir string) ([]filesystem.Entry, error)
	ReadFile(ctx context.Context, path string, t filesystem.Type, file string, w io.Writer) error
}

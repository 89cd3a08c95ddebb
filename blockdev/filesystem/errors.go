package filesystem

import (
	"errors"
	"io/fs"
	"time"
)

var (
	// ErrNeedsMount: this type grows only while mounted.
	ErrNeedsMount = errors.New("filesystem grows only while mounted")
	// ErrCannotGrowMounted: the kernel refuses to grow this type while mounted.
	ErrCannotGrowMounted = errors.New("the kernel refuses to grow this filesystem while mounted")
	// ErrReadOnly: the filesystem is mounted read-only and cannot grow.
	ErrReadOnly = errors.New("filesystem is mounted read-only")
	// ErrTooSmall: the device is below the type's minimum.
	ErrTooSmall = errors.New("device is too small for the filesystem")
	// ErrDamaged: the superblock is not what it should be, or a check failed.
	ErrDamaged = errors.New("filesystem is damaged")
	// ErrDirty: the filesystem was not unmounted cleanly and must be recovered
	// (Check with repair, or a mount) before it can be read.
	ErrDirty = errors.New("filesystem was not unmounted cleanly and must be recovered first")
	// ErrFrozen: somebody has frozen the mounted filesystem already.
	ErrFrozen = errors.New("filesystem is frozen")
	// ErrNoFile: ListDir or ReadFile found no such path.
	ErrNoFile = errors.New("no such file in the volume")
)

// Entry is one name in a directory of an unmounted filesystem.
type Entry struct {
	Name    string      `json:"name"`
	Mode    fs.FileMode `json:"mode"`
	UID     int         `json:"uid"`
	GID     int         `json:"gid"`
	Size    int64       `json:"size"` // bytes
	ModTime time.Time   `json:"modTime,omitzero"`
	Target  string      `json:"target,omitempty"` // of a symbolic link
}

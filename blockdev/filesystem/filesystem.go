package filesystem

// Type is a filesystem that a volume can have.
type Type string

const (
	Ext4  Type = "ext4"
	XFS   Type = "xfs"
	Btrfs Type = "btrfs"
	None  Type = "none" // raw bytes: never mounted by the host
)

// Types are all types, the default first.
var Types = []Type{Ext4, XFS, Btrfs, None}

// MiB is the unit of volume sizes, in bytes.
const MiB = 1 << 20

// Minimum is the smallest image, in bytes, that can hold a filesystem of type t.
func (t Type) Minimum() int64 {
	switch t {
	case XFS:
		return 300 * MiB
	case Btrfs:
		return 109 * MiB
	default:
		return 1 * MiB
	}
}

// Valid reports whether t is one of Types.
func (t Type) Valid() bool {
	switch t {
	case Ext4, XFS, Btrfs, None:
		return true
	}
	return false
}

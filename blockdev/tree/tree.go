package tree

import (
	"crypto/sha256"
	"time"
)

const (
	// Block is the unit in bytes in which contents lie in a store and in images:
	// every run of a file begins at a multiple of it, in the file and in the store,
	// so that it can be shared by reflink.
	Block = 4096
	// Chunk is the unit in bytes in which contents are digested and sent: chunk i
	// of a file is its bytes from i*Chunk on. Small enough that a change in a large
	// file costs little, large enough that most files are one chunk.
	Chunk = 1 << 20
)

// Kind is a type of inode. Others (devices, pipes, sockets) are not kept.
type Kind uint8

const (
	Directory Kind = iota + 1
	Regular
	Symlink
)

// Digest is the SHA-256 of a chunk's bytes, holes read as zeroes. A chunk that is
// zero throughout has the zero Digest.
type Digest [sha256.Size]byte

// Xattr is an extended attribute, POSIX ACLs included, with its full name
// ("user.x", "security.capability", "system.posix_acl_access").
type Xattr struct {
	Name  string
	Value []byte
}

// Run is a range of a file that holds data. Ranges between runs are holes and
// read as zeroes. In a store a run's last block is filled up with zeroes.
type Run struct {
	Offset int64 // in the file, in bytes; a multiple of Block
	Length int64 // in bytes; a multiple of Block but for the end of the file
	Store  int   // which store has the bytes: 0 is the tree's own, others are by agreement
	At     int64 // where in the store, in bytes; a multiple of Block
}

// Node is one inode.
type Node struct {
	// Path is clean, relative and without a leading "./"; "." is the root. Names
	// are bytes, 1 to 255 of them each, not necessarily UTF-8.
	Path    string
	Links   []string // further names of a file or symbolic link, sorted; Path is the first of all
	Kind    Kind
	Mode    uint32 // permission bits with setuid, setgid and sticky: at most 07777
	UID     uint32
	GID     uint32
	ModTime time.Time // UTC; nanoseconds are kept
	Xattrs  []Xattr   // sorted by name
	Target  string    // of a symbolic link
	Size    int64     // of a file, in bytes, holes included
	Runs    []Run     // of a file, ascending, merged where they touch in file and store
	Digests []Digest  // of a file, one for each chunk
}

// Tree is a whole file tree. Nodes are sorted by Path as bytes with '/' before
// everything else, so a directory comes before what is in it and its contents are
// together; the first is the root. It is not changed once it is made.
type Tree struct {
	Nodes []Node
}

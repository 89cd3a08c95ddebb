package blockdev

import (
	"context"
	"io"
	"regexp"
	"time"
)

// ID names an image inside a backend: a kind prefix, a dash and 26 lower-case
// base32 characters (16 bytes: 6 of time, 10 of randomness), for example
// "vol-06c8qk4g1h6s9tj2m0a4n7v5b0". It is made by us, never by a tenant, and is
// safe as a file name, an LV name and an argument.
type ID string

var idForm = regexp.MustCompile(`^[a-z]{3}-[0-9a-v]{26}$`)

// Valid reports whether the ID has the one form that backends accept.
func (id ID) Valid() bool { return idForm.MatchString(string(id)) }

// The kinds of image, as ID prefixes.
const (
	PrefixVolume   = "vol" // a volume's image
	PrefixRevision = "rev" // an immutable template revision
	PrefixSource   = "src" // a cached, sized image that volumes are cloned from; can be made again
	PrefixSnapshot = "snp" // what a volume held at one moment; never written
)

// Kind is a way in which a consumer can use an open image.
type Kind string

const (
	File  Kind = "file"  // a regular file on this host
	Block Kind = "block" // a block device node on this host

	// A worker serves these; see serve/control. Path is a unix socket.
	VhostUser Kind = "vhost-user" // vhost-user-blk
	NBD       Kind = "nbd"        // the default export
)

// Want is what the consumer of an Open can use.
type Want struct {
	Kinds    []Kind // best first
	ReadOnly bool   // enforced by the device itself, not only by a mount
	// Limits hold for who is served by a worker that this Open starts, from its first
	// request on; those of one that runs are what they are, see serve.Throttler.
	Limits Limits
	// Served: a Block may as well be a device whose bytes a worker gives. While that is
	// away its users wait; whoever opened it watches the worker (serve.Sentry), and opens
	// again when it has ended.
	Served bool
}

// Endpoint is where an open image is, on this host.
type Endpoint struct {
	Kind     Kind
	Path     string // of a file, a block node or a unix socket
	Size     int64  // bytes
	ReadOnly bool
	Served   bool   // a worker gives its bytes: VhostUser and NBD, and a Block where Want allows it
	Lease    string // names this opening; Close takes it
}

// Info describes an image as the backend finds it, asked and never remembered.
type Info struct {
	ID          ID
	Draft       bool   // created or cloned, not yet published
	Size        int64  // provisioned bytes
	Allocated   int64  // bytes that occupy space, shared ones included
	Shared      int64  // of Allocated, bytes shared with other images; 0 where the backend cannot tell cheaply
	Description []byte // as last given to Publish or Describe, verified; nil for a draft
	Open        bool   // has an opening now
	Layers      int    // that its bytes lie in besides one plain file: 0 for a flat image
	Absent      int64  // bytes that Flatten has yet to bring into that file, at most; 0 for a flat image
	Remote      bool   // of these, some come from a store that is far away; false for a flat image
	Pool        string // of several, where it is; "" for the first, and where there is one
}

// Capacity is a pool's space, in bytes.
type Capacity struct {
	Total     int64 // what the pool can hold
	Free      int64 // of it, not occupied
	Trash     int64 // occupied by removed images whose space is still being reclaimed
	Allocated int64 // occupied (Total - Free)
}

// Backend keeps images. Every method is idempotent: again after success it
// succeeds, again after a crash it finishes. All are safe for concurrent use;
// calls for one ID are serialised by the caller (the engine's volume lock).
//
// An image begins as a draft: Create or Clone makes it, the caller may fill it
// (Open works on drafts), and Publish makes it an image, atomically and
// durably, together with its description. A draft is never durable and may be
// made again at any time; after a crash List shows what is left of it.
type Backend interface {
	// Create makes a draft of size bytes (a positive multiple of 512) that reads as
	// zero. An existing draft is made anew; ErrBusy while that is open, though an
	// opening that only a dead process had made, and nothing uses, does not count.
	// ErrExists if a published image has the ID.
	Create(ctx context.Context, id ID, size int64) error
	// Publish flushes the draft's data and its description, then makes it an
	// image. Durable on return. A published image with this ID is success, and
	// gets this description. ErrNotFound when there is neither.
	Publish(ctx context.Context, id ID, description []byte) error
	// Describe durably and atomically replaces the description of an image.
	Describe(ctx context.Context, id ID, description []byte) error
	// Grow makes a draft or image at least size bytes large, also while open; it
	// never shrinks. New bytes read as zero. Durable on return. Consumers that
	// hold a block device see the new size when it returns.
	Grow(ctx context.Context, id ID, size int64) error
	// Open gives access to the image. The backend owns what it makes for this
	// (a loop device, an LV activation). An image has at most one opening: Open
	// again with a compatible Want returns the same endpoint and lease (also
	// after a restart of the process: it is found, not made twice), with a
	// conflicting one (writable against read-only, another kind) ErrBusy. The
	// caller counts the users of an opening.
	Open(ctx context.Context, id ID, w Want) (Endpoint, error)
	// Close flushes, then takes away what Open made. ErrBusy while something
	// still uses the device. A lease that is not known any more is success.
	Close(ctx context.Context, id ID, lease string) error
	// Remove takes a draft or image away: on return it is durably not listed any
	// more; its space is reclaimed in the background and shows in
	// Capacity.Trash until then. Absent is success; ErrBusy while open (of a
	// draft, an opening of a dead process does not count, as with Create).
	Remove(ctx context.Context, id ID) error
	// Stat describes one draft or image. ErrNotFound when there is none.
	Stat(ctx context.Context, id ID) (Info, error)
	// List describes all drafts and images, also those that no record names. An
	// image whose description is missing or damaged is moved to quarantine and
	// is not in the list; see Quarantined.
	List(ctx context.Context) ([]Info, error)
	// Quarantined tells what List had to put aside, and why.
	Quarantined(ctx context.Context) ([]Quarantine, error)
	// Capacity tells the pool's space.
	Capacity(ctx context.Context) (Capacity, error)
}

// Quarantine is something found in a pool that nothing explains.
type Quarantine struct {
	Name   string
	Reason string
	Bytes  int64
}

// Cloner is a backend that can share bytes between images.
type Cloner interface {
	// Clone makes a draft dst that holds the bytes of the published image src,
	// copy-on-write, grown to size bytes (never smaller than src). An existing
	// draft dst is made anew. errors.ErrUnsupported where the pool cannot: the
	// caller creates a draft and copies extents.
	Clone(ctx context.Context, dst, src ID, size int64) error
}

// Snapshotter is a backend that can keep what an image holds at one moment.
type Snapshotter interface {
	// Snapshot makes a draft snap that reads for ever as the published image of did
	// at one moment of the call: what was flushed before is in it, what is written
	// after it is not, and of what is written meanwhile it holds what a disk does
	// whose power fails. Also while of is open. held is how long writers waited. An
	// existing draft snap is made anew. A layered snapshot takes only Stat, Clone (as
	// src), Access, Publish, Describe and Remove. errors.ErrUnsupported, and nothing
	// has changed, where bytes had to be copied for it.
	Snapshot(ctx context.Context, snap, of ID) (held time.Duration, err error)
}

// Flattener is a backend with layered images: whose bytes lie in layers of their
// own and of other images, or still have to come from a base. Such an image opens
// as VhostUser or NBD only: as File or Block Open answers ErrLayered, but see
// LayerServer.
type Flattener interface {
	// Flatten brings all bytes of a closed image or draft into one file. Flat is
	// success. It may take as long as a copy takes; cut at any time it goes on where
	// it was. What fails for a base that does not answer is tried again until ctx
	// ends; the error then has the store's reason. ErrBusy while the image is open: then the worker does it, and the image is
	// flat some time after Close.
	Flatten(ctx context.Context, id ID) error
}

// FlatWatcher is a backend that tells cheaply what Stat tells at length, for who asks
// about many images.
type FlatWatcher interface {
	// IsLayered tells whether the bytes of an image or draft lie in more than one plain
	// file, and whether it is open; nothing is read of it. ErrNotFound.
	IsLayered(ctx context.Context, id ID) (layered, open bool, err error)
	// OnFlat has fn told of each image that becomes flat, in the call in which it does: fn
	// returns at once, and calls nothing of the backend. Once, before images are used.
	OnFlat(fn func(id ID))
}

// LayerServer is a backend that can open layered images as Block for who wants them
// Served.
type LayerServer interface {
	// ServesLayers is nil where this host can, now, for an image of this ID. Else
	// errors.ErrUnsupported, with the reason: then Open answers ErrLayered.
	ServesLayers(ctx context.Context, id ID) error
}

// RemoteBase is a base that is far away: a store that answers range requests.
type RemoteBase struct {
	URL    string    // of the bytes, http or https; the operator's, never a tenant's
	Digest [32]byte  // SHA-256 of Chunks
	Chunks io.Reader // what its bytes are, chunk by chunk: a file of overlay.WriteChunks
	// AddressOf is the image that SetAddress is told of when the base moves, which may be
	// in another pool; "" for the image itself.
	AddressOf ID
	Moved     bool // SetAddress was told of it; not read
}

// RemoteCreator is a backend that can make images of bytes that are far away.
type RemoteCreator interface {
	// CreateRemote makes a layered draft that reads as the base, whose bytes come when
	// they are wanted, each verified before it is given away. An existing draft is made
	// anew. Nothing is fetched. Durable when published. Clone of such an image
	// shares the base. ErrCorrupt for chunks that have not this digest or are none,
	// ErrInvalid for an address that is none, or chunks so many that the base is to be
	// digested in larger ones. errors.ErrUnsupported where the pool cannot. No error of
	// the image ever has the address's user information or query in it.
	CreateRemote(ctx context.Context, id ID, base RemoteBase) error
	// HoldsRemote tells whether CreateRemote is supported.
	HoldsRemote() bool
	// RemoteBaseOf gives what an image was made of, for CreateRemote elsewhere: where the
	// base is now, and its chunks until they are closed. ErrInvalid for one that was not.
	RemoteBaseOf(ctx context.Context, id ID) (RemoteBase, io.Closer, error)
	// SetAddress says that the bytes with base.Digest, which images of id (RemoteBase's
	// AddressOf) have as their base, are at base.URL from now on; base.Chunks is not read.
	// All that is not here of such images is asked for there, of open ones too, by workers
	// that run and by those that come. Durable on return. Also for an id that no image
	// has. After an error it may be so or not, and the same again makes it so.
	// errors.ErrUnsupported where the pool cannot have such images.
	SetAddress(ctx context.Context, id ID, base RemoteBase) error
}

// Accessor is a backend that gives this process the bytes of images that it cannot
// open as a file.
type Accessor interface {
	// Access opens a closed image or draft, flat or layered, until Close. ErrBusy while
	// it is open in another way. What of it is far away is waited for until ctx ends.
	Access(ctx context.Context, id ID, readOnly bool) (Bytes, error)
}

// Bytes are those of an image. It is safe for concurrent use.
type Bytes interface {
	io.ReaderAt
	io.WriterAt
	// Sync makes durable what was written before.
	Sync() error
	Size() int64
	io.Closer
}

// Severer is a backend that can cut an image off from its opening: whoever still
// has the device goes on with bytes that are no image any more, or, of what a worker serves, with none.
type Severer interface {
	// CanSever tries, without an effect, whether Sever is possible for an image.
	// errors.ErrUnsupported where the pool cannot.
	CanSever(ctx context.Context, id ID) error
	// Sever gives the image a new body with the bytes that it has now, and forgets
	// its opening. On return nothing that is written to the device of that opening
	// reaches the image, ever, which is proven by there being no way: the device
	// has another file. The device goes with its last user; the space of what it
	// still holds is given back then. Durable on return. Not open is success.
	// Nobody may write meanwhile whose bytes are wanted.
	//
	// Of an opening that a worker serves the worker is ended, flushed if it does not take
	// too long, which is the proof: it had all descriptors. A device over it fails from
	// then on. What the worker had acknowledged is in the image. The next opening has
	// another socket. ErrFailed, when all that is done, for a flush that has failed.
	Sever(ctx context.Context, id ID) error
}

// Trimmer is a backend that can give back the space of zeroed ranges.
type Trimmer interface {
	// Trim punches out blocks of zeroes in a closed image and tells the bytes freed.
	Trim(ctx context.Context, id ID) (freed int64, err error)
}

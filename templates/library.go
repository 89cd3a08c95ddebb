package templates

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
	"holdfast/templates/oci"
	"holdfast/templates/remote"
)

// Space sets pool bytes aside while an archive is staged and built.
type Space interface {
	Reserve(bytes int64, what string) (release func(), err error)
}

// SideLog is what the library needs of the side log. metadata.SideLog is one.
type SideLog interface {
	Append(kind, key string, value any) error // durable on return; nil: removed
	Each(kind string, fn func(key string, value []byte) error) error
}

// Filesystems is what the library needs of filesystems. filesystem.Tools is one.
type Filesystems interface {
	// Make puts an empty filesystem on an image that reads as zero.
	Make(ctx context.Context, path string, t filesystem.Type, o filesystem.MakeOptions) error
	// Grow grows an unmounted filesystem to its device.
	Grow(ctx context.Context, path string, t filesystem.Type) error
	// Check returns nil when an unmounted filesystem is clean.
	Check(ctx context.Context, path string, t filesystem.Type, repair bool) error
	// SizeIn tells how large an unmounted filesystem is, in bytes.
	SizeIn(ctx context.Context, image io.ReaderAt, t filesystem.Type) (int64, error)
	// IdentifyIn gives an unmounted filesystem a UUID.
	IdentifyIn(ctx context.Context, image filesystem.Image, size int64, t filesystem.Type, uuid string) error
}

// Options are what a Library is made of; all required but the limits.
type Options struct {
	Store       *metadata.Store
	SideLog     SideLog          // template heads, so that a rebuild finds templates without revisions
	Pool        blockdev.Backend // gives files and block devices; a blockdev.Cloner where it can
	Space       Space
	Spaces      map[string]Space // of the other pools, by name, where Pool is a Placer
	Filesystems Filesystems      // nil: filesystem.NewTools()
	Staging     string           // directory in the pool for uploads, ours alone; emptied at Open
	Manifests   string           // directory in the pool for what revisions hold, ours alone; can be made again
	Secret      []byte           // signs upload URLs
	Log         *slog.Logger
	Now         func() time.Time // nil: time.Now
	Registries  *oci.Registries  // that images may be imported from; nil: none
	Stores      *remote.Stores   // that revisions may be far away in; nil: none
	OnFailure   func(error)      // told when a flush in the pool failed: the owner ends the process; nil: nobody

	Failpoint func(point string) error // tests: an error at a point between two side effects; nil: none

	MaxArchiveBytes int64 // 0: 64 GiB
	MaxEntries      int64 // 0: 2,000,000
	FreeBytes       int64 // that a compressed archive may unpack to whatever its size; 0: 1 GiB
	MaxRatio        int64 // bytes unpacked for each byte uploaded, above FreeBytes; 0: 200
	MaxUploads      int   // at once; 0: 4
	MaxSources      int   // cached sized images; 0: 64
	MaxImageBytes   int64 // of an image that is published; 0: what a store can have (remote.MaxSize)
	KeepRevisions   int   // READY ones per template, pinned ones not counted; 0: 100

	KeepAge       time.Duration   // of READY revisions; 0: no bound
	ScrubInterval time.Duration   // after which an image is verified again by Run; 0: never
	ScrubRate     int64           // bytes a second that the scrub reads; 0: no bound
	Unclean       bool            // the process before this one did not end in order: verify before use
	OnEvent       func(Happening) // told of what the library did or found by itself; nil: nobody
}

func (o Options) withDefaults() Options {
	o.MaxArchiveBytes = cmp.Or(o.MaxArchiveBytes, 64<<30)
	o.MaxEntries = cmp.Or(o.MaxEntries, 2_000_000)
	o.MaxUploads = cmp.Or(o.MaxUploads, 4)
	o.MaxSources = cmp.Or(o.MaxSources, 64)
	o.MaxImageBytes = cmp.Or(o.MaxImageBytes, remote.MaxSize)
	o.KeepRevisions = cmp.Or(o.KeepRevisions, 100)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Filesystems == nil {
		o.Filesystems = filesystem.NewTools()
	}
	return o
}

// Library keeps templates and sources. It is safe for concurrent use. Reading
// goes to memory alone; what changes is durable when a method returns.
type Library struct {
	o     Options
	locks keyLocks // of templates; taken before mu
	// openings are locks of published images: each has one opening at most, which
	// two readers of one image would close under each other.
	openings  keyLocks
	lent      lent
	uploads   chan struct{}
	sources   *sourceCache
	images    imageBytes
	elsewhere elsewhere
	reflinks  bool // the pool's files can share bytes; tried once

	clearing       keyLocks      // of revisions that are verified before their first use
	verifying      chan struct{} // bounds the verifications that users ask for
	scrubbedBytes  atomic.Int64
	scrubbedImages atomic.Int64
	awaited        atomic.Pointer[func() map[blockdev.ID]bool]

	mu        sync.RWMutex
	records   map[string]*record     // by workspace/name
	revisions map[blockdev.ID]string // to the record's key
	active    map[blockdev.ID]bool   // uploads being ingested
	pins      map[blockdev.ID]int    // revisions that a build reads
	doomed    map[blockdev.ID]bool   // revisions whose images go with their last pin
	suspect   map[blockdev.ID]bool   // revisions to be verified before they are used
	leaving   map[blockdev.ID]string // manifests of revisions that no record names, until their images are gone
	tombs     map[string]*record     // deletions that could not be finished yet
	stopping  context.Context        //nolint:containedctx // ends the builds of sources at Close
	stop      context.CancelCauseFunc
}

// errClosed ends what is under way at Close.
var errClosed = errors.New("the template library is closing")

// Open reads all records, adopts or removes what a crash left in the pool and
// empties staging. It needs the pool for itself: one Library per pool.
func Open(ctx context.Context, o Options) (*Library, error) {
	o = o.withDefaults()
	l := &Library{o: o, uploads: make(chan struct{}, o.MaxUploads), verifying: make(chan struct{}, 2)}
	l.stopping, l.stop = context.WithCancelCause(context.Background())
	if err := l.load(ctx, false); err != nil {
		return nil, fmt.Errorf("open templates: %w", err)
	}
	return l, nil
}

// Close ends builds of sources that are under way and waits for what runs in
// the background. Callers end their own Ingests first, by their contexts.
func (l *Library) Close() error {
	l.stop(errClosed)
	l.sources.close()
	return nil
}

func (l *Library) now() time.Time { return l.o.Now().UTC().Round(0) }

// at is a point between two side effects, for tests.
func (l *Library) at(point string) error {
	if l.o.Failpoint == nil {
		return nil
	}
	return l.o.Failpoint(point)
}

func (l *Library) lookup(key string) *record {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.records[key]
}

func (l *Library) tomb(key string) *record {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.tombs[key]
}

// replace puts a record into memory; mu is held.
func (l *Library) replace(key string, next *record) {
	if old := l.records[key]; old != nil {
		for _, v := range old.Template.Revisions {
			delete(l.revisions, v.ID)
			if v.Status == Ready {
				l.leaving[v.ID] = manifestName(v)
			}
		}
	}
	delete(l.records, key)
	if next == nil || next.Removed {
		return
	}
	l.records[key] = next
	for _, v := range next.Template.Revisions {
		l.revisions[v.ID] = key
		delete(l.leaving, v.ID)
	}
}

// Put creates a template or changes it; created tells which. Without create a
// missing one is ErrNotFound. Bad fields are ErrInvalid.
func (l *Library) Put(ctx context.Context, workspace, name string, c Change, create bool) (t Template, created bool, err error) {
	if err := errors.Join(checkName(name), c.check()); err != nil {
		return Template{}, false, err
	}
	r, err := l.change(ctx, keyOf(workspace, name), func(r *record) (*record, error) {
		created = r == nil
		now := l.now()
		if r == nil {
			if !create {
				return nil, notFound(name)
			}
			r = &record{Template: Template{Workspace: workspace, Name: name, NextNumber: 1, CreatedAt: now, CreatedBy: c.Actor}}
		}
		c.apply(&r.Template)
		r.Template.UpdatedAt, r.Template.UpdatedBy = now, c.Actor
		return r, nil
	})
	if err != nil {
		return Template{}, false, err
	}
	return r.Template.clone(), created, nil
}

func (c Change) apply(t *Template) {
	if c.DisplayName != nil {
		t.DisplayName = *c.DisplayName
	}
	if c.Labels != nil {
		t.Labels = c.Labels
	}
	if c.Description != nil {
		t.Description = *c.Description
	}
	if c.DefaultSizeMiB != nil {
		t.DefaultSizeMiB = *c.DefaultSizeMiB
	}
	if c.KeepVersions != nil {
		t.Retention.Versions = *c.KeepVersions
	}
	if c.KeepDays != nil {
		t.Retention.Days = *c.KeepDays
	}
}

func notFound(name string) error { return fmt.Errorf("%w: %.120q", ErrNotFound, name) }

// Template finds one by name; ErrNotFound.
func (l *Library) Template(workspace, name string) (Template, error) {
	r := l.lookup(keyOf(workspace, name))
	if r == nil {
		return Template{}, notFound(name)
	}
	return r.Template.clone(), nil
}

// List gives all templates of a workspace, by name.
func (l *Library) List(workspace string) ([]Template, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	list := []Template{}
	for key, r := range l.records {
		if strings.HasPrefix(key, workspace+"/") {
			list = append(list, r.Template.clone())
		}
	}
	slices.SortFunc(list, func(a, b Template) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// Resolve finds a READY revision by "name", "name:latest", "name:N" or "name:version".
func (l *Library) Resolve(_ context.Context, workspace, ref string) (Template, Revision, error) {
	reference, err := ParseReference(ref)
	if err != nil {
		return Template{}, Revision{}, err
	}
	r := l.lookup(keyOf(workspace, reference.Name))
	if r == nil {
		return Template{}, Revision{}, notFound(ref)
	}
	v := r.find(reference.Version)
	switch {
	case v == nil && (reference.Version == "" || reference.Version == LatestVersion):
		if newest := r.Template.newestOf(Revision.hadImage); newest != nil {
			return Template{}, Revision{}, newest.damagedError()
		}
		return Template{}, Revision{}, fmt.Errorf("%w: %q has no version that is ready", ErrNotFound, reference.Name)
	case v == nil:
		return Template{}, Revision{}, notFound(ref)
	case v.Damaged:
		return Template{}, Revision{}, v.damagedError()
	case v.Status != Ready:
		return Template{}, Revision{}, fmt.Errorf("%w: version %q of %q is not ready but %s", ErrNotFound, v.Name, reference.Name, v.Status)
	}
	return r.Template.clone(), *v, nil
}

// Bytes tells the pool bytes that revisions and sources occupy, without asking
// the pool: as of when each was made.
func (l *Library) Bytes() int64 { return l.images.total() }

// Stats are numbers for metrics.
type Stats struct {
	Templates     int
	Revisions     int // READY
	Sources       int // cached
	RevisionBytes int64
	SourceBytes   int64
	Uploads       int    // being ingested now
	Hits          uint64 // of Source, since Open
	Misses        uint64
	Damaged       int   // revisions
	Suspect       int   // to be verified before they are used
	Scrubbed      int64 // images that the scrub verified, since Open
	ScrubbedBytes int64 // read to verify, since Open
}

// Stats counts what there is now.
func (l *Library) Stats() Stats {
	var s Stats
	s.Sources, s.Hits, s.Misses = l.sources.stats()
	s.RevisionBytes, s.SourceBytes = l.images.byKind()
	l.mu.RLock()
	defer l.mu.RUnlock()
	s.Templates, s.Uploads, s.Suspect = len(l.records), len(l.active), len(l.suspect)
	s.Scrubbed, s.ScrubbedBytes = l.scrubbedImages.Load(), l.scrubbedBytes.Load()
	for _, r := range l.records {
		for _, v := range r.Template.Revisions {
			if v.Status == Ready {
				s.Revisions++
			}
			if v.Damaged {
				s.Damaged++
			}
		}
	}
	return s
}

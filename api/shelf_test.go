package api_test

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"holdfast/api"
	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/templates"
	"holdfast/templates/delta"
	"holdfast/templates/oci"
	"holdfast/templates/remote"
)

// shelf is a library of templates in memory: revisions are numbers and sizes,
// archives are only measured.
type shelf struct {
	w         *world
	mu        sync.Mutex
	all       map[string]*templates.Template // by workspace/name
	uploads   map[string]upload              // by id
	hold      chan struct{}                  // closed: uploads go on; nil: at once
	begun     chan struct{}                  // one for each upload that has begun
	lacks     bool                           // of a delta
	diffs     int                            // how many Diff tells
	diffFails error                          // after these
	broken    bool                           // what Verify finds
	sources   map[blockdev.ID][]templates.SourceSpec

	registryFails bool
}

type upload struct {
	template *templates.Template
	index    int
}

func newShelf(w *world) *shelf {
	return &shelf{w: w, all: map[string]*templates.Template{}, uploads: map[string]upload{}, begun: make(chan struct{}, 100)}
}

func (s *shelf) Put(_ context.Context, workspace, name string, c templates.Change, create bool) (templates.Template, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.w.now()
	t := s.all[workspace+"/"+name]
	created := t == nil
	if created {
		if !create {
			return templates.Template{}, false, templates.ErrNotFound
		}
		t = &templates.Template{Workspace: workspace, Name: name, NextNumber: 1, CreatedAt: now, CreatedBy: c.Actor}
		s.all[workspace+"/"+name] = t
	}
	t.UpdatedAt, t.UpdatedBy = now, c.Actor
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
	return *t, created, nil
}

func (s *shelf) Template(workspace, name string) (templates.Template, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.all[workspace+"/"+name]
	if t == nil {
		return templates.Template{}, fmt.Errorf("%w: %q", templates.ErrNotFound, name)
	}
	return *t, nil
}

func (s *shelf) List(workspace string) (list []templates.Template, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(s.all)) {
		if strings.HasPrefix(key, workspace+"/") {
			list = append(list, *s.all[key])
		}
	}
	return list, nil
}

func (s *shelf) Delete(_ context.Context, workspace, name, _ string) (templates.Template, error) {
	t, err := s.Template(workspace, name)
	if err != nil {
		return t, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, workspace+"/"+name)
	return t, nil
}

func (s *shelf) DeleteRevision(_ context.Context, workspace, name, version, _ string) (templates.Template, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.all[workspace+"/"+name]
	if t == nil {
		return templates.Template{}, templates.ErrNotFound
	}
	i := slices.IndexFunc(t.Revisions, func(r templates.Revision) bool { return r.Name == version })
	switch {
	case i < 0:
		return templates.Template{}, fmt.Errorf("%w: version %q", templates.ErrNotFound, version)
	case t.Revisions[i].Pinned != nil:
		return templates.Template{}, fmt.Errorf("%w: version %s", templates.ErrPinned, version)
	case len(t.Revisions) == 1:
		return templates.Template{}, templates.ErrLastRevision
	}
	t.Revisions = slices.Delete(slices.Clone(t.Revisions), i, i+1)
	return *t, nil
}

// find gives a revision by name; s.mu is held.
func (s *shelf) find(workspace, name, version string) (*templates.Template, int, error) {
	t := s.all[workspace+"/"+name]
	if t == nil {
		return nil, 0, templates.ErrNotFound
	}
	i := slices.IndexFunc(t.Revisions, func(r templates.Revision) bool { return r.Name == version })
	if i < 0 {
		return nil, 0, fmt.Errorf("%w: version %q", templates.ErrNotFound, version)
	}
	return t, i, nil
}

// change changes a revision and gives it.
func (s *shelf) change(workspace, name, version string, change func(*templates.Revision)) (templates.Revision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, i, err := s.find(workspace, name, version)
	if err != nil {
		return templates.Revision{}, err
	}
	t.Revisions = slices.Clone(t.Revisions)
	change(&t.Revisions[i])
	return t.Revisions[i], nil
}

func (s *shelf) Pin(_ context.Context, workspace, name, version, actor string) (templates.Revision, error) {
	return s.change(workspace, name, version, func(r *templates.Revision) { r.Pinned = &templates.Pin{By: actor, At: s.w.now()} })
}

func (s *shelf) Unpin(_ context.Context, workspace, name, version, _ string) (templates.Revision, error) {
	return s.change(workspace, name, version, func(r *templates.Revision) { r.Pinned = nil })
}

func (s *shelf) Verify(_ context.Context, workspace, name, version string) (templates.Revision, error) {
	return s.change(workspace, name, version, func(r *templates.Revision) {
		r.VerifiedAt = s.w.now()
		if s.broken {
			r.Status, r.Failure, r.Damaged = templates.Failed, "damaged: its image is not what was published", true
		}
	})
}

func (s *shelf) Rollback(_ context.Context, workspace, name, version, actor string) (templates.Revision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, i, err := s.find(workspace, name, version)
	if err != nil {
		return templates.Revision{}, err
	}
	r := t.Revisions[i]
	if r.Damaged {
		return r, fmt.Errorf("%w: version %s", templates.ErrDamaged, version)
	}
	r.ID, r.RollbackOf, r.Number, r.CreatedBy = blockdevtest.NewID(blockdev.PrefixRevision), r.Number, t.NextNumber, actor
	r.Name = strconv.Itoa(r.Number)
	t.NextNumber++
	t.Revisions = append(slices.Clone(t.Revisions), r)
	return r, nil
}

func (s *shelf) Sources() map[blockdev.ID][]templates.SourceSpec { return s.sources }

func (s *shelf) BeginUpload(_ context.Context, workspace, name, version, _ string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.all[workspace+"/"+name]
	number := t.NextNumber
	t.NextNumber++
	if version == "" {
		version = strconv.Itoa(number)
	}
	id := blockdevtest.NewID(blockdev.PrefixRevision)
	t.Revisions = append(slices.Clone(t.Revisions), templates.Revision{ID: id, Workspace: workspace, Template: name, Name: version, Number: number,
		Status: templates.Created, CreatedAt: s.w.now()})
	s.uploads[string(id)] = upload{t, len(t.Revisions) - 1}
	return "/uploads/" + string(id) + "?expires=1&signature=good", nil
}

func (s *shelf) Ingest(ctx context.Context, to templates.Upload, length int64, body io.Reader) (templates.Revision, error) {
	s.mu.Lock()
	u, ok := s.uploads[to.ID]
	delete(s.uploads, to.ID)
	s.mu.Unlock()
	if !ok || to.Signature != "good" {
		return templates.Revision{}, templates.ErrUploadGone
	}
	s.begun <- struct{}{}
	if s.hold != nil {
		select {
		case <-s.hold:
		case <-ctx.Done():
			return templates.Revision{}, ctx.Err()
		}
	}
	h := sha256.New()
	n, err := io.Copy(h, body)
	if err != nil || n != length {
		return templates.Revision{}, fmt.Errorf("%w: it ends after %d of %d bytes", templates.ErrArchive, n, length)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &u.template.Revisions[u.index]
	r.Status, r.ContentBytes, r.MinimumBytes, r.Digest, r.ReadyAt = templates.Ready, n, 10<<20, "sha256:"+hex.EncodeToString(h.Sum(nil)), s.w.now()
	return *r, nil
}

// Known knows a query of one word.
func (s *shelf) Known(_ context.Context, u templates.Upload, query io.Reader) (delta.Answer, error) {
	s.mu.Lock()
	_, ok := s.uploads[u.ID]
	s.mu.Unlock()
	if !ok || u.Signature != "good" {
		return delta.Answer{}, templates.ErrUploadGone
	}
	b, err := io.ReadAll(query)
	switch {
	case err != nil:
		return delta.Answer{}, err
	case string(b) == "same":
		return delta.Answer{Same: true}, nil
	case string(b) != "query":
		return delta.Answer{}, fmt.Errorf("%w: not a query", templates.ErrInvalid)
	}
	return delta.Answer{Known: delta.Bits{5}}, nil
}

func (s *shelf) IngestDelta(ctx context.Context, u templates.Upload, length int64, body io.Reader) (templates.Revision, error) {
	if s.lacks {
		return templates.Revision{}, fmt.Errorf("%w: 1 of 2", templates.ErrChunks)
	}
	return s.Ingest(ctx, u, length, body)
}

// Diff makes up differences, as many as diffs says.
func (s *shelf) Diff(_ context.Context, workspace, name, from, to string, begin func(from, to templates.Revision), each func(templates.Difference) error) error {
	s.mu.Lock()
	a, i, errA := s.find(workspace, name, from)
	_, j, errB := s.find(workspace, name, cmp.Or(to, "2"))
	s.mu.Unlock()
	if err := errors.Join(errA, errB); err != nil {
		return err
	}
	begin(a.Revisions[i], a.Revisions[j])
	for k := range s.diffs {
		n := &templates.Inode{Kind: "file", Mode: 0o644, Size: int64(k), ModTime: time.Unix(1, 0)}
		m := *n
		m.Mode = 0o4755
		c := [...]templates.Difference{
			{Path: fmt.Sprintf("f%07d", k), Action: "changed", Aspects: []string{"mode"}, Before: n, After: &m},
			{Path: "odd\xff", Action: "added", After: &templates.Inode{Kind: "symlink", Target: "t", ModTime: time.Unix(2, 0)}},
			{Path: "d", Action: "removed", Before: &templates.Inode{Kind: "directory", ModTime: time.Unix(3, 0)}},
		}[k%3]
		if err := each(c); err != nil {
			return err
		}
	}
	return s.diffFails
}

// Archive is the template's name.
func (s *shelf) Archive(_ context.Context, workspace, name, version string, begin func(templates.Revision, int64) io.Writer) error {
	s.mu.Lock()
	t, i, err := s.find(workspace, name, cmp.Or(version, "1"))
	s.mu.Unlock()
	if err != nil {
		return err
	}
	_, err = io.WriteString(begin(t.Revisions[i], int64(len(name))), name)
	return err
}

// Import knows one registry, which has one image.
func (s *shelf) Import(ctx context.Context, workspace string, i templates.Import) (templates.Revision, error) {
	switch {
	case !strings.HasPrefix(i.Image, "registry.example/"):
		return templates.Revision{}, fmt.Errorf("%w: %q is not listed", oci.ErrNotAllowed, i.Image)
	case s.registryFails:
		return templates.Revision{}, fmt.Errorf("%w: down", oci.ErrRegistry)
	case i.Image != "registry.example/app:1":
		return templates.Revision{}, fmt.Errorf("%w: no %s", oci.ErrNotFound, i.Image)
	}
	if _, _, err := s.Put(ctx, workspace, i.Template, templates.Change{Actor: i.Actor}, true); err != nil {
		return templates.Revision{}, err
	}
	target, err := s.BeginUpload(ctx, workspace, i.Template, i.Version, i.Actor)
	if err != nil {
		return templates.Revision{}, err
	}
	id, _, _ := strings.Cut(strings.TrimPrefix(target, "/uploads/"), "?")
	return s.Ingest(ctx, templates.Upload{ID: id, Signature: "good"}, int64(len(i.Image)), strings.NewReader(i.Image))
}

// Publish is the template's name.
func (s *shelf) Publish(_ context.Context, workspace, name string, p templates.Publication, begin func(templates.Revision) io.Writer) error {
	s.mu.Lock()
	t, i, err := s.find(workspace, name, cmp.Or(p.Version, "1"))
	s.mu.Unlock()
	if err != nil {
		return err
	}
	w := begin(t.Revisions[i])
	if s.hold != nil {
		s.begun <- struct{}{}
		<-s.hold
	}
	_, err = fmt.Fprintf(w, "%s %s %d", name, p.Filesystem, p.SizeMiB)
	return err
}

// Register knows one store, which has one manifest.
func (s *shelf) Register(ctx context.Context, workspace string, r templates.Registration) (templates.Revision, error) {
	switch {
	case !strings.HasPrefix(r.Manifest, "https://store.example/"):
		return templates.Revision{}, fmt.Errorf("%w: %q is not listed", remote.ErrNotAllowed, r.Manifest)
	case s.registryFails:
		return templates.Revision{}, fmt.Errorf("%w: down", remote.ErrStore)
	case r.Digest != "sha256:good":
		return templates.Revision{}, fmt.Errorf("%w: %s", remote.ErrManifest, r.Digest)
	}
	if _, _, err := s.Put(ctx, workspace, r.Template, templates.Change{Actor: r.Actor}, true); err != nil {
		return templates.Revision{}, err
	}
	target, err := s.BeginUpload(ctx, workspace, r.Template, r.Version, r.Actor)
	if err != nil {
		return templates.Revision{}, err
	}
	id, _, _ := strings.Cut(strings.TrimPrefix(target, "/uploads/"), "?")
	v, err := s.Ingest(ctx, templates.Upload{ID: id, Signature: "good"}, int64(len(r.Digest)), strings.NewReader(r.Digest))
	v.ImageBytes, v.Remote = 64<<20, &templates.Remote{Manifest: r.Manifest, Image: "https://store.example/secret/path", Filesystem: "ext4"}
	return v, err
}

// Relocate knows the same store.
func (s *shelf) Relocate(ctx context.Context, workspace string, r templates.Relocation) (templates.Revision, error) {
	_, v, err := s.Resolve(ctx, workspace, r.Template+":"+r.Version)
	switch {
	case !strings.HasPrefix(r.Manifest, "https://store.example/"):
		return v, fmt.Errorf("%w: %q is not listed", remote.ErrNotAllowed, r.Manifest)
	case err != nil:
		return v, err
	case s.registryFails:
		return v, fmt.Errorf("%w: down", remote.ErrStore)
	}
	v.ImageBytes, v.Remote = 64<<20, &templates.Remote{Manifest: r.Manifest, Image: "https://store.example/secret/next", Filesystem: "ext4"}
	return v, nil
}

// RelocateImage knows the same store, and that no version is there of a volume.
func (s *shelf) RelocateImage(_ context.Context, _ blockdev.ID, manifest string) error {
	switch {
	case !strings.HasPrefix(manifest, "https://store.example/"):
		return fmt.Errorf("%w: %q is not listed", remote.ErrNotAllowed, manifest)
	case s.registryFails:
		return fmt.Errorf("%w: down", remote.ErrStore)
	}
	return nil
}

// Capture clones, and keeps no contents.
func (s *shelf) Capture(ctx context.Context, workspace string, c templates.Capture) (templates.Captured, error) {
	draft := blockdevtest.NewID(blockdev.PrefixSource)
	if err := c.Clone(ctx, draft); err != nil {
		return templates.Captured{}, err
	}
	if err := s.w.pool.Remove(ctx, draft); err != nil {
		return templates.Captured{}, err
	}
	if _, _, err := s.Put(ctx, workspace, c.Template, templates.Change{Actor: c.Actor}, true); err != nil {
		return templates.Captured{}, err
	}
	target, err := s.BeginUpload(ctx, workspace, c.Template, c.Version, c.Actor)
	if err != nil {
		return templates.Captured{}, err
	}
	id, _, _ := strings.Cut(strings.TrimPrefix(target, "/uploads/"), "?")
	r, err := s.Ingest(ctx, templates.Upload{ID: id, Signature: "good"}, 4, strings.NewReader("tree"))
	return templates.Captured{Revision: r}, err
}

func (s *shelf) Copy(context.Context, blockdev.ID, blockdev.ID, int64) error { return nil }

func (s *shelf) Resolve(_ context.Context, workspace, ref string) (templates.Template, templates.Revision, error) {
	parsed, err := templates.ParseReference(ref)
	if err != nil {
		return templates.Template{}, templates.Revision{}, err
	}
	t, err := s.Template(workspace, parsed.Name)
	if err != nil {
		return t, templates.Revision{}, err
	}
	if r := t.Latest(); r != nil && (parsed.Version == "" || parsed.Version == templates.LatestVersion) {
		return t, *r, nil
	}
	for _, r := range t.Revisions {
		if r.Name == parsed.Version && r.Status == templates.Ready {
			return t, r, nil
		}
	}
	return t, templates.Revision{}, fmt.Errorf("%w: %q", templates.ErrNotFound, ref)
}

func (s *shelf) Hydrate(ctx context.Context, dst blockdev.ID, spec templates.SourceSpec) error {
	if spec.Revision != "" && spec.Size < 10<<20 {
		return fmt.Errorf("%w: it needs 10 MB", templates.ErrTooSmall)
	}
	s.w.fs.set("mem:"+string(dst), spec.Size)
	return s.w.pool.Create(ctx, dst, spec.Size)
}

// access is keys and workspaces in memory.
type access struct {
	mu         sync.Mutex
	principals map[string]api.Principal // by secret
	keys       []api.Key
	workspaces map[string]api.Workspace
}

func newAccess() *access {
	a := &access{workspaces: map[string]api.Workspace{}, principals: map[string]api.Principal{
		adminKey:   {KeyID: "key-admin", Name: "ann", Role: api.Admin, Workspace: "main"},
		readerKey:  {KeyID: "key-reader", Name: "ron", Role: api.Reader, Workspace: "main"},
		writerKey:  {KeyID: "key-writer", Name: "wes", Role: api.Writer, Workspace: "main"},
		foreignKey: {KeyID: "key-foreign", Name: "fay", Role: api.Admin, Workspace: "other"},
		nodeKey:    {KeyID: "key-node", Name: "ned", Role: api.Admin, ControlPlane: true},
	}}
	for _, name := range []string{"main", "other"} {
		a.workspaces[name] = api.Workspace{ID: "ws-" + name, Name: name, CreatedAt: time.Unix(1, 0), UpdatedAt: time.Unix(1, 0)}
	}
	return a
}

func (a *access) Authenticate(r *http.Request) (api.Principal, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range []string{"X-Blaxel-Authorization", "Authorization"} {
		if secret, ok := strings.CutPrefix(r.Header.Get(h), "Bearer "); ok {
			if p, ok := a.principals[secret]; ok {
				return p, nil
			}
		}
	}
	return api.Principal{}, api.ErrUnauthorized
}

func (a *access) IssueToken(secret string) (string, time.Duration, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, ok := a.principals[secret]
	if !ok {
		return "", 0, api.ErrUnauthorized
	}
	a.principals["token-of-"+secret] = p
	return "token-of-" + secret, time.Hour, nil
}

func (a *access) CreateKey(_ context.Context, k api.NewKey) (api.Key, string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	id := "key-" + strconv.Itoa(len(a.keys)+1)
	made := api.Key{ID: id, Name: k.Name, Prefix: "hf_", Workspace: k.Workspace, Role: k.Role, ControlPlane: k.ControlPlane,
		CreatedAt: time.Unix(2, 0), CreatedBy: k.Actor, ExpiresAt: k.ExpiresAt}
	a.keys = append(a.keys, made)
	secret := "hf_secret_" + id
	a.principals[secret] = api.Principal{KeyID: id, Name: k.Name, Role: k.Role, Workspace: k.Workspace, ControlPlane: k.ControlPlane}
	return made, secret, nil
}

func (a *access) Keys(workspace string) (list []api.Key, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, k := range a.keys {
		if workspace == "" || k.Workspace == workspace {
			list = append(list, k)
		}
	}
	return list, nil
}

func (a *access) RevokeKey(_ context.Context, workspace, id, _ string) (api.Key, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, k := range a.keys {
		if k.ID == id && (workspace == "" || k.Workspace == workspace) {
			a.keys[i].RevokedAt = time.Unix(3, 0)
			delete(a.principals, "hf_secret_"+id)
			return a.keys[i], nil
		}
	}
	return api.Key{}, fmt.Errorf("%w: key %q", api.ErrMissing, id)
}

func (a *access) PutWorkspace(_ context.Context, name string, displayName *string, _ string) (api.Workspace, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w, ok := a.workspaces[name]
	if !ok {
		w = api.Workspace{ID: "ws-" + name, Name: name, CreatedAt: time.Unix(4, 0)}
	}
	w.UpdatedAt = time.Unix(5, 0)
	if displayName != nil {
		w.DisplayName = *displayName
	}
	a.workspaces[name] = w
	return w, nil
}

func (a *access) Workspace(name string) (api.Workspace, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w, ok := a.workspaces[name]
	if !ok {
		return w, fmt.Errorf("%w: workspace %q", api.ErrMissing, name)
	}
	return w, nil
}

func (a *access) Workspaces() ([]api.Workspace, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.SortedFunc(maps.Values(a.workspaces), func(x, y api.Workspace) int { return strings.Compare(x.Name, y.Name) }), nil
}

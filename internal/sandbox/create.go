package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"holdfast/api"
	"holdfast/blockdev/attach"
	"holdfast/engine"
)

// Bounds of what a client may ask for.
const (
	maxVolumes = 32
	maxEnvs    = 200
	maxText    = 32 << 10 // bytes of a variable's value
	minMemory  = 16       // MiB
	// defaultMemory is for those that name none, in MiB.
	defaultMemory = 512
	defaultImage  = "minimal"
)

// Create makes a sandbox with its volumes and returns when it is usable. A create
// that fails leaves nothing.
func (r *Runtime) Create(ctx context.Context, n api.NewSandbox, missingOnly bool) (api.Sandbox, error) {
	rec, err := r.design(n)
	if err != nil {
		return api.Sandbox{}, err
	}
	return do(ctx, r, func(ctx context.Context) (api.Sandbox, error) {
		for {
			b, fresh, err := r.claim(&rec)
			if err != nil {
				return api.Sandbox{}, err
			}
			if fresh {
				return r.make(ctx, b, rec)
			}
			there, err := r.meet(ctx, b, missingOnly)
			if err != nil || there != nil {
				return deref(there), err
			}
		}
	})
}

func deref(s *api.Sandbox) api.Sandbox {
	if s == nil {
		return api.Sandbox{}
	}
	return *s
}

// meet deals with a sandbox that has the name already: one that has failed makes
// place (nil, nil), one that works is the answer where that is wanted.
func (r *Runtime) meet(ctx context.Context, b *box, missingOnly bool) (*api.Sandbox, error) {
	if rec := b.record(); rec.Phase == deploying && !missingOnly {
		return nil, problem(api.ErrSandboxCreating, "metadata.name", "Sandbox %s is being created", rec.Name)
	}
	if err := b.lock(ctx); err != nil {
		return nil, err
	}
	defer b.release()
	rec := b.record()
	if there, err := r.find(rec.Workspace, rec.Name); err != nil || there != b {
		return nil, nil //nolint:nilerr // it went while we waited: its name is free
	}
	switch {
	case rec.Phase == failed:
		return nil, r.erase(ctx, rec)
	case rec.Phase == deployed && missingOnly:
		s := rec.show()
		return &s, nil
	case rec.Phase == deleting:
		return nil, problem(api.ErrSandboxExists, "metadata.name", "Sandbox %s is being deleted: try again when it is gone", rec.Name)
	}
	return nil, problem(api.ErrSandboxExists, "metadata.name", "Sandbox %s already exists", rec.Name)
}

// claim takes the name and a range of users. A box that is there is given back.
func (r *Runtime) claim(rec *record) (b *box, fresh bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b := r.boxes[key(rec.Workspace, rec.Name)]; b != nil {
		return b, false, nil
	}
	if len(r.boxes) >= r.o.Max {
		return nil, false, problem(engine.ErrQuota, "", "this server runs at most %d sandboxes: delete some", r.o.Max)
	}
	taken := map[int]bool{}
	for _, b := range r.boxes {
		taken[b.record().Slot] = true
	}
	for rec.Slot = 0; taken[rec.Slot]; rec.Slot++ {
	}
	b = newBox(*rec)
	b.turn <- struct{}{} // ours from the beginning
	r.boxes[key(rec.Workspace, rec.Name)] = b
	return b, true, nil
}

// make makes a sandbox that is claimed: the wish first, then the volumes that are
// its own, its root filesystem, the container, the volumes in it, its start.
func (r *Runtime) make(ctx context.Context, b *box, rec record) (api.Sandbox, error) {
	defer b.release()
	if err := r.save(ctx, b, rec); err != nil {
		return api.Sandbox{}, errors.Join(err, r.erase(ctx, rec))
	}
	err := r.deploy(ctx, b, &rec)
	if err == nil {
		rec.Phase = deployed
		rec.happened(r.now(), "deployment", "Deployment successful")
		err = r.save(ctx, b, rec)
	}
	if err != nil {
		r.o.Log.Warn("a sandbox could not be made: it is taken back", "sandbox", rec.ID, "workspace", rec.Workspace, "name", rec.Name, "err", err)
		rec.Phase = deleting
		undo := r.saveFreeing(ctx, b, rec)
		if undo == nil {
			undo = r.finish(ctx, b)
		}
		if undo != nil {
			r.o.Log.Warn("it could not be taken back: it is tried again", "sandbox", rec.ID, "err", undo)
			r.wake()
		}
		return api.Sandbox{}, err
	}
	return rec.show(), nil
}

func (r *Runtime) deploy(ctx context.Context, b *box, rec *record) error {
	for _, m := range rec.Volumes {
		if err := r.makeEphemeral(ctx, *rec, m); err != nil {
			return err
		}
	}
	im, known, err := r.images.find(ctx, rec.Image)
	if err != nil {
		r.o.Log.Error("an image cannot be had", "image", rec.Image, "err", err)
		return problem(engine.ErrConflict, "spec.runtime.image", "%s cannot be had now: the operator's log has the reason", rec.Image)
	}
	if !known && rec.Image != defaultImage {
		rec.happened(r.now(), "image", "This server has no image of that name: the minimal one is used")
	}
	rec.ImageEnv, rec.Dir = im.env, im.cwd
	root := r.rootfs(*rec)
	root.image = im.dir
	if err := os.MkdirAll(root.dir, 0o711); err != nil { //nolint:gosec // passage only
		return err
	}
	if err := root.assemble(); err != nil {
		return fmt.Errorf("root filesystem: %w", err)
	}
	for _, m := range rec.Volumes {
		if err := root.makeDirs(m.MountPath); err != nil {
			return problem(engine.ErrInvalid, "spec.volumes", "mountPath %s cannot be made in the image", m.MountPath)
		}
	}
	if err := writeConfig(root.dir, r.configuration(*rec)); err != nil {
		return err
	}
	if rec.First, err = r.containers.create(ctx, rec.ID); err != nil {
		return err
	}
	if err := r.save(ctx, b, *rec); err != nil {
		return err
	}
	if err := root.release(); err != nil {
		return err
	}
	for i, m := range rec.Volumes {
		if err := r.makeInner(*rec, i); err != nil {
			return err
		}
		if err := r.attachVolume(ctx, *rec, i, m); err != nil {
			return err
		}
	}
	return r.containers.start(ctx, rec.ID)
}

func (r *Runtime) rootfs(rec record) rootfs {
	// At most half of the memory: a layer that could fill all of it would have the
	// kernel kill every process of the sandbox, the first one last, and never fit.
	return rootfs{dir: r.containers.bundle(rec.ID), firstID: r.firstID(rec), scratch: min(r.o.LayerMiB, rec.MemoryMiB/2) << 20}
}

func (r *Runtime) firstID(rec record) int {
	if r.o.FirstID == 0 {
		return 0
	}
	return r.o.FirstID + rec.Slot*idRange
}

func (r *Runtime) configuration(rec record) configuration {
	return configuration{
		name: rec.Name, rootfs: r.rootfs(rec).path(), tool: r.images.placed, cgroup: "/holdfast/" + rec.ID,
		firstID: r.firstID(rec), limits: limits{memory: rec.MemoryMiB << 20, pids: r.o.Pids},
	}
}

// makeEphemeral makes a volume that lives as long as its sandbox. It is an
// ordinary volume of the workspace: listed, marked, and counted in its quota.
func (r *Runtime) makeEphemeral(ctx context.Context, rec record, m mount) error {
	if !m.ephemeral() {
		return nil
	}
	_, err := r.o.Engine.CreateVolume(ctx, engine.CreateVolume{
		Workspace: rec.Workspace, Name: m.Volume, DisplayName: "Ephemeral volume of a sandbox", Region: rec.Region, SizeMiB: &m.SizeMB,
		Labels: map[string]string{"holdfast-ephemeral": rec.Name, "holdfast-ephemeral-name": m.Name}, Actor: rec.CreatedBy,
	})
	return err
}

// makeInner makes the directory of a mount path that lies in a volume attached
// before it. That is done from inside: the host's own users have no names there.
func (r *Runtime) makeInner(rec record, i int) error {
	at := rec.Volumes[i].MountPath
	if !slices.ContainsFunc(rec.Volumes[:i], func(m mount) bool { return strings.HasPrefix(at, m.MountPath+"/") }) {
		return nil
	}
	var said tail
	c, err := r.containers.exec(rec.ID, newProcess([]string{toolPath, "mkdir", "-p", at}, nil, "/"), false, io.Discard, &said)
	if err != nil {
		return err
	}
	<-c.done
	if c.pidfd != nil {
		c.pidfd.Close()
	}
	if c.failed == nil && c.code != 0 {
		return problem(engine.ErrInvalid, fmt.Sprintf("spec.volumes[%d].mountPath", i), "%s cannot be made in the volume above it", at)
	}
	return c.failed
}

// attachVolume attaches one volume. A sandbox that has it and is being deleted is
// waited for.
func (r *Runtime) attachVolume(ctx context.Context, rec record, i int, m mount) error {
	ask := engine.AttachVolume{
		Holder: rec.holder(), Target: attach.Target{Type: api.SandboxTarget, Container: rec.ID},
		MountPath: m.MountPath, ReadOnly: m.ReadOnly, Actor: rec.CreatedBy,
	}
	_, err := r.o.Engine.Attach(ctx, rec.Workspace, m.Volume, ask)
	if errors.Is(err, engine.ErrAttached) && r.awaitLeaving(ctx, rec.Workspace, m.Volume) {
		_, err = r.o.Engine.Attach(ctx, rec.Workspace, m.Volume, ask)
	}
	if errors.Is(err, engine.ErrNotFound) {
		return volumeMissing(i, m.Name)
	}
	return err
}

// leavingWait bounds the wait for a sandbox that is being deleted.
const leavingWait = 20 * time.Second

// awaitLeaving waits for the sandboxes that hold a volume and are being deleted.
func (r *Runtime) awaitLeaving(ctx context.Context, workspace, volume string) (left bool) {
	v, err := r.o.Engine.Volume(workspace, volume)
	if err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, leavingWait)
	defer cancel()
	for _, b := range r.all() {
		rec := b.record()
		if rec.Phase != deleting || !slices.ContainsFunc(v.Attachments, func(a engine.Attachment) bool { return a.Target.Container == rec.ID }) {
			continue
		}
		if b.lock(ctx) != nil {
			return false
		}
		b.release()
		left = true
	}
	return left
}

func volumeMissing(i int, name string) error {
	return problem(api.ErrSandboxVolume, fmt.Sprintf("spec.volumes[%d].name", i), "volume %.60q not found: create it first", name)
}

// design makes the record that a request asks for, or says what is wrong with it.
func (r *Runtime) design(n api.NewSandbox) (record, error) {
	now := r.now()
	rec := record{
		ID: newID(), Workspace: n.Workspace, Name: n.Name, DisplayName: n.DisplayName, Labels: n.Labels, ExternalID: n.ExternalID,
		Region: n.Region, Image: n.Image, MemoryMiB: n.MemoryMiB, Envs: n.Envs, Ports: n.Ports, Phase: deploying, Dir: "/",
		CreatedAt: now, UpdatedAt: now, CreatedBy: n.Actor, UpdatedBy: n.Actor,
	}
	if rec.Name == "" {
		rec.Name = "sandbox-" + rec.ID[len(rec.ID)-8:]
	}
	if rec.Image == "" {
		rec.Image = defaultImage
	}
	if rec.MemoryMiB == 0 {
		rec.MemoryMiB = defaultMemory
	}
	rec.MemoryMiB = min(rec.MemoryMiB, r.o.MaxMemoryMiB)
	if err := errors.Join(checkRecord(rec), checkEnvs(n.Envs)); err != nil {
		return record{}, firstProblem(err)
	}
	for i, v := range n.Volumes {
		m, err := r.designMount(rec, i, v)
		if err != nil {
			return record{}, err
		}
		rec.Volumes = append(rec.Volumes, m)
	}
	if err := checkMounts(rec.Volumes); err != nil {
		return record{}, err
	}
	return rec, r.chooseRegion(&rec)
}

func (r *Runtime) designMount(rec record, i int, v api.VolumeMount) (mount, error) {
	field := func(name string) string { return fmt.Sprintf("spec.volumes[%d].%s", i, name) }
	m := mount{VolumeMount: v, Volume: v.Name}
	if v.Name == "" {
		return m, problem(engine.ErrInvalid, field("name"), "is required")
	}
	if err := checkMountPath(v.MountPath); err != nil {
		return m, problem(engine.ErrInvalid, field("mountPath"), "%v", err)
	}
	switch v.Type {
	case "", persistent:
		m.Type, m.SizeMB = persistent, 0
		if _, err := r.o.Engine.Volume(rec.Workspace, v.Name); err != nil {
			if errors.Is(err, engine.ErrNotFound) {
				return m, volumeMissing(i, v.Name)
			}
			return m, err
		}
	case ephemeral:
		if v.SizeMB < 1 {
			return m, problem(engine.ErrInvalid, field("sizeMb"), "an ephemeral volume must say its size in MB, at least 1")
		}
		if v.ReadOnly {
			return m, problem(engine.ErrInvalid, field("readOnly"), "an ephemeral volume is empty: read-only it is of no use")
		}
		m.Volume = fmt.Sprintf("ephemeral-%s-%d", rec.ID[len(rec.ID)-12:], i)
	default:
		return m, problem(engine.ErrInvalid, field("type"), "must be persistent or ephemeral")
	}
	return m, nil
}

// chooseRegion: a sandbox is where its volumes are.
func (r *Runtime) chooseRegion(rec *record) error {
	asked := rec.Region
	if asked != "" && len(r.o.Regions) > 0 && !slices.Contains(r.o.Regions, asked) {
		return problem(engine.ErrInvalid, "spec.region", "unknown region %.70q: this server has %s", asked, strings.Join(r.o.Regions, ", "))
	}
	for i, m := range rec.Volumes {
		if m.ephemeral() {
			continue
		}
		v, err := r.o.Engine.Volume(rec.Workspace, m.Volume)
		if err != nil {
			return err
		}
		if rec.Region == "" {
			rec.Region = v.Region
		}
		if v.Region != rec.Region {
			return problem(engine.ErrInvalid, fmt.Sprintf("spec.volumes[%d].name", i), "volume %s is in region %s and the sandbox in %s", m.Name, v.Region, rec.Region)
		}
	}
	if rec.Region == "" {
		rec.Region = r.o.Region
	}
	return nil
}

// checkMounts: each place and each volume once, and parents before what is in them.
func checkMounts(mounts []mount) error {
	if len(mounts) > maxVolumes {
		return problem(engine.ErrInvalid, "spec.volumes", "must be at most %d", maxVolumes)
	}
	paths, names := map[string]bool{}, map[string]bool{}
	for i, m := range mounts {
		if paths[m.MountPath] {
			return problem(engine.ErrInvalid, fmt.Sprintf("spec.volumes[%d].mountPath", i), "%s is used twice", m.MountPath)
		}
		if names[m.Name] {
			return problem(engine.ErrInvalid, fmt.Sprintf("spec.volumes[%d].name", i), "volume %.60q is named twice", m.Name)
		}
		paths[m.MountPath], names[m.Name] = true, true
	}
	slices.SortStableFunc(mounts, func(a, b mount) int {
		return strings.Count(a.MountPath, "/") - strings.Count(b.MountPath, "/")
	})
	return nil
}

func checkMountPath(p string) error {
	switch {
	case !path.IsAbs(p) || path.Clean(p) != p || p == "/":
		return errors.New("must be an absolute, clean path below /")
	case len(p) > 1024:
		return errors.New("is longer than 1024 bytes")
	case !utf8.ValidString(p) || strings.ContainsFunc(p, unicode.IsControl):
		return errors.New("must be UTF-8 without control characters")
	}
	for _, taken := range []string{"/proc", "/sys", "/dev", toolDir} {
		if p == taken || strings.HasPrefix(p, taken+"/") {
			return fmt.Errorf("must not be in %s", taken)
		}
	}
	return nil
}

func firstProblem(err error) error {
	var p *engine.Problem
	if errors.As(err, &p) {
		return p
	}
	return err
}

package main_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/tarball"
)

// kills is how often TestKill kills; HOLDFAST_KILLS asks for more.
const kills = 100

// TestKill kills the daemon without warning, again and again, under load and
// while it starts. After each restart everything that had been acknowledged is
// there, nothing that was deleted is back, and what was under way is one or the
// other, whole. At the end no loop device, mount or file is left that no record
// explains.
func TestKill(t *testing.T) {
	rounds := kills
	if text := os.Getenv("HOLDFAST_KILLS"); text != "" {
		var err error
		rounds, err = strconv.Atoi(text)
		must(t, err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d, %d kills", seed, rounds)
	random := rand.New(rand.NewPCG(seed, 0))
	n := newNode(t)
	tree := t.TempDir()
	must(t, os.WriteFile(filepath.Join(tree, "f"), []byte("template\n"), 0o644))
	n.push("base", tree)
	workers := make([]*worker, 4)
	for i := range workers {
		workers[i] = &worker{n: n, name: fmt.Sprintf("w%d", i), tree: tree, random: rand.New(rand.NewPCG(seed, uint64(i)+1)),
			volumes: map[string]*volumeModel{}, keys: map[string]bool{}}
	}
	for round := range rounds {
		if round > 0 {
			if random.IntN(5) == 0 {
				n.killWhileStarting(time.Duration(random.IntN(250)) * time.Millisecond)
			}
			n.start()
		}
		verifyAll(t, n, workers, round)
		n.loadAndKill(workers, time.Duration(5+random.IntN(200))*time.Millisecond)
		if t.Failed() {
			t.Fatalf("round %d of seed %d", round, seed)
		}
	}
	n.start()
	verifyAll(t, n, workers, rounds)
	done := 0
	for _, w := range workers {
		done += w.done
	}
	t.Logf("%d acknowledged operations", done)
	if done < rounds {
		t.Errorf("only %d operations were acknowledged in %d rounds: that is no load", done, rounds)
	}
	n.checkNothingIsLeft(workers)
}

func (n *node) killWhileStarting(after time.Duration) {
	_, err := n.begin()
	must(n.t, err)
	time.Sleep(after) // not to wait for something: the moment itself is random
	n.kill()
}

// loadAndKill lets the workers work until the daemon is killed.
func (n *node) loadAndKill(workers []*worker, after time.Duration) {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var wg sync.WaitGroup
	for _, w := range workers {
		wg.Go(func() { w.work(ctx) })
	}
	time.Sleep(after) // as above
	stop()
	n.kill()
	wg.Wait()
}

// volumeModel is what is known of a volume. Each field with a maybe-value has
// an operation under way that was not acknowledged.
type volumeModel struct {
	exists, maybe bool // maybe: a create or delete was cut
	size, newSize int64
	label, newer  string
	attachment    string // acknowledged id, "" when detached
	attachCut     bool   // an attach or detach was cut
	held          bool   // its detach was told that something holds it: it goes on by itself
	content       string // written and synced while attached
}

// worker changes volumes and keys of its own, one operation after the other.
type worker struct {
	n       *node
	name    string
	tree    string
	random  *rand.Rand
	volumes map[string]*volumeModel
	keys    map[string]bool // by id: not revoked
	keyCut  string          // its revocation was cut
	pushed  int             // versions of the worker's template that were acknowledged
	next    int
	done    int
}

// mostVolumes keeps the pool from filling up.
const mostVolumes = 6

func (w *worker) work(ctx context.Context) {
	for ctx.Err() == nil {
		err := w.step(ctx)
		var refused *client.Error
		if errors.As(err, &refused) && refused.Status != 503 {
			w.n.t.Errorf("%s: %v", w.name, err)
			return
		}
		if err != nil {
			return // cut
		}
		w.done++
	}
}

func (w *worker) step(ctx context.Context) error {
	name := w.pick()
	switch dice := w.random.IntN(20); {
	case name == "" || (dice < 5 && len(w.volumes) < mostVolumes):
		return w.create(ctx)
	case dice < 5:
		return w.delete(ctx, name)
	case dice < 8:
		return w.delete(ctx, name)
	case dice < 10:
		return w.relabel(ctx, name)
	case dice < 11:
		return w.grow(ctx, name)
	case dice < 16:
		return w.toggle(ctx, name)
	case dice < 18:
		return w.key(ctx)
	case dice < 19:
		return w.push(ctx)
	}
	_, err := w.n.Volume(ctx, name)
	return err
}

// pick chooses a volume that is there, "" when there is none.
func (w *worker) pick() string {
	names := slices.DeleteFunc(slices.Sorted(maps.Keys(w.volumes)), func(name string) bool { return !w.volumes[name].exists })
	if len(names) == 0 {
		return ""
	}
	return names[w.random.IntN(len(names))]
}

func (w *worker) create(ctx context.Context) error {
	w.next++
	name := fmt.Sprintf("%s-%d", w.name, w.next)
	m := &volumeModel{maybe: true, size: int64(1 + w.random.IntN(8))}
	spec := client.VolumeSpec{Size: m.size}
	if w.random.IntN(2) == 0 {
		spec.Template = "base"
	}
	w.volumes[name] = m
	_, err := w.n.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: spec}, "")
	if err == nil {
		m.exists, m.maybe = true, false
	}
	return err
}

func (w *worker) delete(ctx context.Context, name string) error {
	m := w.volumes[name]
	if m.attachment != "" {
		return w.toggle(ctx, name)
	}
	m.maybe = true
	_, err := w.n.DeleteVolume(ctx, name)
	if err != nil {
		return err
	}
	m.exists, m.maybe = false, false // its model stays until it was verified once
	_, err = w.n.Volume(ctx, name)
	switch {
	case err == nil:
		w.n.t.Errorf("%s is there after its delete was acknowledged", name)
		return nil
	case client.IsNotFound(err):
		return nil
	}
	return err
}

func (w *worker) relabel(ctx context.Context, name string) error {
	m := w.volumes[name]
	m.newer = strconv.Itoa(w.random.IntN(1000))
	_, err := w.n.UpdateVolume(ctx, name, client.VolumeChange{Labels: map[string]string{"l": m.newer}})
	if err == nil {
		m.label, m.newer = m.newer, ""
	}
	return err
}

func (w *worker) grow(ctx context.Context, name string) error {
	m := w.volumes[name]
	if m.attachment != "" || m.size > 24 {
		return nil
	}
	m.newSize = m.size + 4
	_, err := w.n.UpdateVolume(ctx, name, client.VolumeChange{SizeMiB: &m.newSize})
	if err == nil {
		m.size, m.newSize = m.newSize, 0
	}
	return err
}

func (w *worker) place(name string) string { return filepath.Join(w.n.state, "attach", name) }

// toggle attaches a volume on the host and writes, or detaches it.
func (w *worker) toggle(ctx context.Context, name string) error {
	m := w.volumes[name]
	m.attachCut = true
	if m.attachment != "" {
		_, err := w.n.Detach(ctx, name, m.attachment)
		var refused *client.Error
		switch {
		case err == nil, m.held && client.IsNotFound(err):
			m.attachment, m.attachCut, m.held = "", false, false
			return nil
		case errors.As(err, &refused) && refused.Status == 409 && strings.Contains(refused.Message, "detaching is tried again"):
			m.held = true // by a container that is just being started, a cage of the daemon itself say
			return nil
		}
		return err
	}
	a, err := w.n.Attach(ctx, name, client.Attachment{Holder: "sandbox:" + name, Target: client.Target{Type: "host", Path: w.place(name)}})
	if err != nil {
		return err
	}
	m.attachment, m.attachCut = a.ID, false
	text := strconv.FormatUint(w.random.Uint64(), 36)
	if err := os.WriteFile(filepath.Join(w.place(name), "content"), []byte(text), 0o600); err != nil {
		w.n.t.Errorf("write to attached %s: %v", name, err)
		return nil
	}
	m.content = text
	return nil
}

func (w *worker) key(ctx context.Context) error {
	for id, good := range w.keys {
		if good && w.random.IntN(2) == 0 {
			w.keyCut = id
			_, err := w.n.RevokeKey(ctx, id)
			if err == nil {
				w.keys[id], w.keyCut = false, ""
			}
			return err
		}
	}
	k, err := w.n.CreateKey(ctx, client.NewKey{Name: w.name, Workspace: "main", Role: "reader"})
	if err == nil {
		w.keys[k.ID] = true
	}
	return err
}

// mostVersions bounds the images of the worker's template.
const mostVersions = 3

func (w *worker) push(ctx context.Context) error {
	if w.pushed >= mostVersions {
		return nil
	}
	plan, err := tarball.New(ctx, w.tree)
	if err != nil {
		return err
	}
	archive := plan.Reader()
	defer archive.Close()
	_, err = w.n.PushTemplate(ctx, client.Push{Name: "t-" + w.name, Archive: archive, Length: plan.Length()})
	if err == nil {
		w.pushed++
	}
	return err
}

// verifyAll compares what the daemon shows with what was acknowledged, and
// learns how the operations that were cut have ended.
func verifyAll(t *testing.T, n *node, workers []*worker, round int) {
	t.Helper()
	found := map[string]client.Volume{}
	for v, err := range n.Volumes(t.Context(), client.VolumeQuery{}) {
		must(t, err)
		full, err := n.Volume(t.Context(), v.Metadata.Name)
		must(t, err)
		found[full.Metadata.Name] = full
	}
	for _, w := range workers {
		for name, m := range w.volumes {
			v, there := found[name]
			delete(found, name)
			if problem := w.verify(t.Context(), name, m, v, there); problem != "" {
				t.Errorf("round %d: %s: %s\nmodel %+v\nfound %+v", round, name, problem, *m, v)
			}
			if !m.exists {
				delete(w.volumes, name)
			}
		}
		w.verifyKeys(t)
		w.verifyTemplate(t)
	}
	for name := range found {
		t.Errorf("round %d: volume %s: nobody asked for it, or it was deleted", round, name)
	}
}

func (w *worker) verify(ctx context.Context, name string, m *volumeModel, v client.Volume, there bool) string {
	switch {
	case !there && m.exists && !m.maybe:
		return "an acknowledged volume is lost"
	case there && !m.exists && !m.maybe:
		return "a deleted volume is back"
	}
	m.exists, m.maybe = there, false
	if !there {
		return ""
	}
	if v.Status != "DEPLOYED" {
		return "is " + v.Status
	}
	if v.Spec.Size != m.size && v.Spec.Size != m.newSize {
		return "has another size"
	}
	if v.State.Sizes == nil || v.State.Sizes.Device != v.Spec.Size<<20 {
		return "device and record differ in size"
	}
	m.size, m.newSize = v.Spec.Size, 0
	if label := v.Metadata.Labels["l"]; label != m.label && label != m.newer {
		return "has another label"
	}
	m.label, m.newer = v.Metadata.Labels["l"], ""
	return w.verifyAttachment(ctx, name, m, v)
}

// verifyAttachment: what the record says is what the kernel has.
func (w *worker) verifyAttachment(ctx context.Context, name string, m *volumeModel, v client.Volume) string {
	got := ""
	if len(v.State.Attachments) > 0 {
		got = v.State.Attachments[0].ID
		if p := v.State.Attachments[0].Phase; p != "attached" {
			if !m.attachCut {
				return "the attachment is " + p
			}
			if _, err := w.n.Detach(ctx, name, got); err != nil {
				return "the cut attachment does not detach: " + err.Error()
			}
			got = ""
		}
	}
	if got != m.attachment && !m.attachCut {
		return "the acknowledged attachment is not there, or one is"
	}
	m.attachment, m.attachCut = got, false
	mounted := slices.Contains(blockdevtest.MountsUnder(w.n.t, w.n.state), w.place(name))
	if mounted != (got != "") {
		return fmt.Sprintf("attached is %v, mounted is %v", got != "", mounted)
	}
	if m.content == "" {
		return ""
	}
	var b bytes.Buffer
	if mounted {
		text, err := os.ReadFile(filepath.Join(w.place(name), "content"))
		if err != nil {
			return err.Error()
		}
		b.Write(text)
	} else if err := w.n.ReadFile(ctx, name, "/content", &b); err != nil {
		return err.Error()
	}
	if b.String() != m.content {
		return fmt.Sprintf("content is %q", b.String())
	}
	return ""
}

func (w *worker) verifyKeys(t *testing.T) {
	t.Helper()
	all, err := w.n.Keys(t.Context())
	must(t, err)
	revoked := map[string]bool{}
	for _, k := range all {
		revoked[k.ID] = !k.RevokedAt.IsZero()
	}
	for id, good := range w.keys {
		is, there := revoked[id]
		switch {
		case !there:
			t.Errorf("%s: key %s is lost", w.name, id)
		case is && good && id != w.keyCut, !is && !good:
			t.Errorf("%s: key %s: revoked is %v, acknowledged %v", w.name, id, is, !good)
		}
		w.keys[id] = !is
	}
	w.keyCut = ""
}

func (w *worker) verifyTemplate(t *testing.T) {
	t.Helper()
	tpl, err := w.n.Template(t.Context(), "t-"+w.name)
	if client.IsNotFound(err) && w.pushed == 0 {
		return
	}
	must(t, err)
	ready := 0
	for _, v := range tpl.Versions {
		if v.Status == "READY" {
			ready++
		}
	}
	if ready < w.pushed {
		t.Errorf("%s: %d versions are ready, %d were acknowledged", w.name, ready, w.pushed)
	}
	w.pushed = ready
}

// checkNothingIsLeft: every device, mount and file below the state directory
// belongs to a volume, a template or the daemon itself.
func (n *node) checkNothingIsLeft(workers []*worker) {
	attached, volumes := 0, 0
	for _, w := range workers {
		for _, m := range w.volumes {
			volumes++
			if m.attachment != "" {
				attached++
			}
		}
	}
	// pool.img and perhaps meta.img have a loop device and a mount, the stage has a
	// mount; each attached volume has a loop device and two mounts (stage, place).
	images := len(glob(n.t, n.state, "*.img"))
	want := fmt.Sprintf("%d loops, %d mounts, %d volume images, no drafts, no trash, no staging, no quarantine",
		images+attached, images+1+2*attached, volumes)
	var got string
	for deadline := time.Now().Add(patience); got != want && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		got = n.leftNow()
	}
	if got != want {
		n.t.Errorf("left behind:\n got %s\nwant %s", got, want)
	}
	for _, m := range blockdevtest.MountsUnder(n.t, n.state) {
		if strings.HasSuffix(m, "//deleted") {
			n.t.Errorf("mount of a deleted directory: %s", m)
		}
	}
}

func (n *node) leftNow() string {
	loops := len(blockdevtest.LoopsUnder(n.t, n.state))
	text := fmt.Sprintf("%d loops, %d mounts, %d volume images", loops, len(blockdevtest.MountsUnder(n.t, n.state)),
		len(glob(n.t, n.state, "pool/images/vol-*")))
	for _, dir := range []string{"drafts", "trash", "staging", "quarantine"} {
		pattern := "pool/" + dir + "/*"
		if dir == "staging" {
			pattern = "pool/staging/uploads/*"
		}
		if left := glob(n.t, n.state, pattern); len(left) > 0 {
			text += fmt.Sprintf(", %s %v", dir, left)
		} else {
			text += ", no " + dir
		}
	}
	return text
}

func glob(t testing.TB, dir, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	must(t, err)
	return names
}

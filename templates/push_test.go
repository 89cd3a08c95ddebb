package templates_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev/tree"
	"holdfast/internal/tarball"
	"holdfast/templates"
	"holdfast/templates/delta"
)

// pushed is a directory on its way to a library, as a client does it.
type pushed struct {
	r    *rig
	plan *tarball.Plan
	tree tree.Tree
}

func (r *rig) plan(dir string) *pushed {
	r.t.Helper()
	plan, err := tarball.New(r.t.Context(), dir)
	if err != nil {
		r.t.Fatal(err)
	}
	t, err := plan.Tree(r.t.Context(), nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return &pushed{r, plan, t}
}

// ask asks what the library has, and tells how many bytes that took.
func (p *pushed) ask(u upload) (delta.Answer, int64) {
	p.r.t.Helper()
	q, err := delta.NewQuery(p.tree).Encode()
	if err != nil {
		p.r.t.Fatal(err)
	}
	a, err := p.r.Known(p.r.t.Context(), u.upload(), bytes.NewReader(q))
	if err != nil {
		p.r.t.Fatal(err)
	}
	return a, int64(len(q) + len(a.Known))
}

func (p *pushed) body(a delta.Answer) []byte {
	p.r.t.Helper()
	chunks := p.plan.Chunks()
	defer chunks.Close()
	b, err := delta.NewBody(p.tree, a.Known, func(_ context.Context, c delta.Chunk, b []byte) error { return chunks.Read(c.Node, c.Index, b) })
	if a.Same {
		b, err = delta.NewSame(p.tree.Identity())
	}
	var out bytes.Buffer
	if err == nil {
		err = b.Write(p.r.t.Context(), &out)
	}
	if err != nil {
		p.r.t.Fatal(err)
	}
	return out.Bytes()
}

func (r *rig) sendDelta(u upload, b []byte) (templates.Revision, error) {
	return r.IngestDelta(r.t.Context(), u.upload(), int64(len(b)), bytes.NewReader(b))
}

// sendPlain pushes a directory as a plain tar, and tells its length.
func (r *rig) sendPlain(name, dir string) (templates.Revision, int64) {
	r.t.Helper()
	plan, err := tarball.New(r.t.Context(), dir)
	if err != nil {
		r.t.Fatal(err)
	}
	archive := plan.Reader()
	defer archive.Close()
	v, err := r.Ingest(r.t.Context(), r.begin(name, "").upload(), plan.Length(), archive)
	if err != nil {
		r.t.Fatal(err)
	}
	return v, plan.Length()
}

// bushy is a directory of many files of all sizes with random contents.
func bushy(t *testing.T, files int) string {
	t.Helper()
	dir := t.TempDir()
	random := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	for i := range files {
		name := filepath.Join(dir, fmt.Sprintf("d%d", i%10), fmt.Sprintf("f%d", i))
		size := 1 + random.IntN(20_000)
		if i%100 == 0 {
			size = 2<<20 + random.IntN(1000)
		}
		from := random.IntN(len(b) - size)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, b[from:from+size], 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "d1", "f1"), filepath.Join(dir, "hard")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A second push sends what changed, and makes what a plain tar makes.
func TestPushSendsWhatIsLacking(t *testing.T) {
	r := reflinkRig(t, 2<<30, nil)
	r.put("app")
	r.put("plain")
	dir := bushy(t, 1000)
	first, whole := r.sendPlain("app", dir)

	// Unchanged: next to nothing, and the same image.
	p, u := r.plan(dir), r.begin("app", "")
	a, asked := p.ask(u)
	if !a.Same {
		t.Error("the same tree is not known: the client makes another one of it than the server")
	}
	body := p.body(a)
	again, err := r.sendDelta(u, body)
	if err != nil {
		t.Fatal(err)
	}
	if sent := asked + int64(len(body)); sent*100 > whole {
		t.Errorf("an unchanged push takes %d bytes, the first %d", sent, whole)
	} else {
		t.Logf("unchanged: %.3f %% of the first push's bytes", 100*float64(sent)/float64(whole))
	}
	if again.ImageDigest != first.ImageDigest || again.TreeDigest != first.TreeDigest || again.Number != 2 {
		t.Errorf("%+v, the first is %+v", again, first)
	}

	// One byte in a hundred is in a file that changed; one file is new, one gone, one
	// has another mode.
	random, rewritten := rand.NewChaCha8([32]byte{9}), int64(0)
	for i := 1; rewritten*100 < whole; i += 7 {
		name := filepath.Join(dir, fmt.Sprintf("d%d", i%10), fmt.Sprintf("f%d", i))
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 1<<20 {
			continue
		}
		b := make([]byte, info.Size())
		_, _ = random.Read(b)
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
		rewritten += info.Size()
	}
	err = errors.Join(os.WriteFile(filepath.Join(dir, "new"), []byte("new"), 0o600), os.Remove(filepath.Join(dir, "d3", "f3")), os.Chmod(filepath.Join(dir, "d4", "f4"), 0o4755))
	if err != nil {
		t.Fatal(err)
	}
	p, u = r.plan(dir), r.begin("app", "")
	a, asked = p.ask(u)
	if a.Same || !a.Known.Any() {
		t.Fatalf("%+v", a)
	}
	body = p.body(a)
	changed, err := r.sendDelta(u, body)
	if err != nil {
		t.Fatal(err)
	}
	sent := asked + int64(len(body))
	if sent*10 > whole {
		t.Errorf("a push of 1 %% changes takes %d bytes, the first %d", sent, whole)
	}
	t.Logf("1 %% changed: %.2f %% of the first push's bytes", 100*float64(sent)/float64(whole))
	plain, _ := r.sendPlain("plain", dir)
	if changed.TreeDigest != plain.TreeDigest || changed.ImageDigest != plain.ImageDigest {
		t.Errorf("a delta makes another image than a tar: %+v\n%+v", changed, plain)
	}
	if got, err := r.Verify(t.Context(), workspace, "app", "3"); err != nil || got.Status != templates.Ready {
		t.Errorf("%+v, %v", got, err)
	}
	r.expectStagingEmpty()
	if held := r.space.reserved(); held != 0 {
		t.Errorf("%d bytes stay set aside", held)
	}
}

// What other templates and workspaces have is not told, and not taken.
func TestKnownIsOfTheTemplate(t *testing.T) {
	r := plainRig(t, nil)
	dir := bushy(t, 20)
	r.put("app")
	r.put("other")
	r.sendPlain("app", dir)
	p, u := r.plan(dir), r.begin("other", "")
	a, _ := p.ask(u)
	if a.Same || a.Known.Any() {
		t.Errorf("another template's chunks are told: %+v", a)
	}
	// A client that claims to know gets nothing.
	all := delta.NewBits(len(delta.Chunks(p.tree)))
	for i := range delta.Chunks(p.tree) {
		all.Set(i)
	}
	for _, lie := range []delta.Answer{{Known: all}, {Same: true}} {
		if v, err := r.sendDelta(u, p.body(lie)); !errors.Is(err, templates.ErrChunks) {
			t.Errorf("%+v, %v", v, err)
		}
	}
	// The URL is as good as before.
	if v, err := r.sendDelta(u, p.body(a)); err != nil || v.Number != 1 {
		t.Errorf("%+v, %v", v, err)
	}
}

// A version that is deleted between the question and the delta, and one that is
// deleted while its chunks are read.
func TestDeltaOfADeletedVersion(t *testing.T) {
	r := plainRig(t, nil)
	ctx := t.Context()
	dir := bushy(t, 50)
	r.put("app")
	r.sendPlain("app", dir)
	r.push("app", pack(t, file("a", "keeps the template alive")))
	if err := os.WriteFile(filepath.Join(dir, "new"), []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, u := r.plan(dir), r.begin("app", "")
	a, _ := p.ask(u)
	body := p.body(a)
	// While it is read: the image goes when it was.
	slow := &pausing{r: bytes.NewReader(body), at: len(body) - 1, pause: func() {
		if _, err := r.DeleteRevision(ctx, workspace, "app", "1", actor); err != nil {
			t.Error(err)
		}
	}}
	v, err := r.IngestDelta(ctx, u.upload(), int64(len(body)), slow)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.numbers("app"); got != "2 3" {
		t.Error(got)
	}
	r.expectPool(2)
	// In between.
	if err := os.WriteFile(filepath.Join(dir, "new"), []byte("newer"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, u = r.plan(dir), r.begin("app", "")
	if a, _ = p.ask(u); !a.Known.Any() {
		t.Fatal("nothing is known")
	}
	if _, err := r.DeleteRevision(ctx, workspace, "app", v.Name, actor); err != nil {
		t.Fatal(err)
	}
	if _, err := r.sendDelta(u, p.body(a)); !errors.Is(err, templates.ErrChunks) {
		t.Errorf("%v", err)
	}
	again, _ := p.ask(u)
	if again.Known.Any() {
		t.Error("a deleted version's chunks are told")
	}
	if _, err := r.sendDelta(u, p.body(again)); err != nil {
		t.Error(err)
	}
	r.expectStagingEmpty()
}

// pausing calls pause once, before it gives the byte at a place.
type pausing struct {
	r     io.Reader
	n, at int
	pause func()
}

func (p *pausing) Read(b []byte) (int, error) {
	if p.n < p.at {
		b = b[:min(len(b), p.at-p.n)]
	} else if p.pause != nil {
		p.pause()
		p.pause = nil
	}
	n, err := p.r.Read(b)
	p.n += n
	return n, err
}

// A chunk that is damaged in the image is never used: it is asked for, and the
// version is verified.
func TestDeltaOfADamagedVersion(t *testing.T) {
	var told events
	unclean := false
	r := plainRig(t, scrubbed(&told, &unclean))
	dir := bushy(t, 30)
	if err := os.WriteFile(filepath.Join(dir, "found"), []byte(contents), 0o644); err != nil {
		t.Fatal(err)
	}
	r.put("app")
	one, _ := r.sendPlain("app", dir)
	if err := os.WriteFile(filepath.Join(dir, "new"), []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.flip(one.ID, contents)
	p, u := r.plan(dir), r.begin("app", "")
	a, _ := p.ask(u)
	if !a.Known.Any() {
		t.Fatal("nothing is known")
	}
	if _, err := r.sendDelta(u, p.body(a)); !errors.Is(err, templates.ErrChunks) {
		t.Errorf("a damaged chunk was taken: %v", err)
	}
	if err := r.Scrub(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := told.take(); !strings.Contains(got, "app:1 damaged") {
		t.Errorf("told %q", got)
	}
	a, _ = p.ask(u)
	if a.Known.Any() {
		t.Error("a damaged version's chunks are told")
	}
	v, err := r.sendDelta(u, p.body(a))
	if err != nil {
		t.Fatal(err)
	}
	if v, err := r.Verify(t.Context(), workspace, "app", v.Name); err != nil || v.Status != templates.Ready {
		t.Errorf("%+v, %v", v, err)
	}
}

// What is no delta leaves nothing, and the URL as it was; a tree that no archive
// may be is refused by the same rules.
func TestHostileDeltas(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.MaxEntries, o.MaxArchiveBytes = 1000, 64<<20 })
	ctx := t.Context()
	r.put("app")
	u := r.begin("app", "")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("contents"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := r.plan(dir)
	good := p.body(delta.Answer{})
	for what, b := range map[string][]byte{
		"nothing": {}, "text": []byte("hello"), "cut": good[:len(good)-3], "longer": append(bytes.Clone(good), 1), "changed": append(bytes.Clone(good[:len(good)-1]), 'X'),
	} {
		if _, err := r.sendDelta(u, b); !errors.Is(err, templates.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, length := range []int64{-1, int64(len(good)) - 1, int64(len(good)) + 1, 1 << 50} {
		if _, err := r.IngestDelta(ctx, u.upload(), length, bytes.NewReader(good)); !errors.Is(err, templates.ErrInvalid) {
			t.Errorf("length %d: %v", length, err)
		}
	}
	if _, err := r.Known(ctx, u.upload(), strings.NewReader("hello")); !errors.Is(err, templates.ErrInvalid) {
		t.Errorf("%v", err)
	}
	forged := u
	forged.signature = "x" + u.signature[1:]
	if forged == u {
		forged.signature = "y" + u.signature[1:]
	}
	if _, err := r.sendDelta(forged, good); !errors.Is(err, templates.ErrUploadGone) {
		t.Errorf("%v", err)
	}
	if _, err := r.Known(ctx, forged.upload(), strings.NewReader("")); !errors.Is(err, templates.ErrUploadGone) {
		t.Errorf("%v", err)
	}
	r.expectStagingEmpty()
	r.expectPool(0)
	if _, err := r.sendDelta(u, good); err != nil {
		t.Errorf("the URL is of no use any more: %v", err)
	}
	if _, err := r.sendDelta(u, good); !errors.Is(err, templates.ErrUploadGone) {
		t.Errorf("used twice: %v", err)
	}
	// Trees that lie: the rules for archives hold.
	for what, change := range map[string]func(n *tree.Node){
		"above":         func(n *tree.Node) { n.Path = "../f" },
		"absolute":      func(n *tree.Node) { n.Path = "/f" },
		"NUL":           func(n *tree.Node) { n.Path = "f\x00g" },
		"long name":     func(n *tree.Node) { n.Path = strings.Repeat("n", 256) },
		"link above":    func(n *tree.Node) { n.Links = []string{"z/../../f"} },
		"link to self":  func(n *tree.Node) { n.Links = []string{"f"} },
		"no target":     func(n *tree.Node) { n.Kind, n.Size, n.Digests = tree.Symlink, 0, nil },
		"strange xattr": func(n *tree.Node) { n.Xattrs = []tree.Xattr{{Name: "system.odd", Value: []byte("x")}} },
		"large xattr":   func(n *tree.Node) { n.Xattrs = []tree.Xattr{{Name: "user.x", Value: make([]byte, 5000)}} },
		"owner":         func(n *tree.Node) { n.UID = 1<<32 - 1 },
	} {
		p := r.plan(dir)
		change(p.tree.Find("f"))
		var out bytes.Buffer
		b, err := delta.NewBody(p.tree, nil, func(_ context.Context, c delta.Chunk, b []byte) error { copy(b, "contents"); return nil })
		if err == nil {
			err = b.Write(ctx, &out)
		}
		if err != nil {
			t.Fatal(what, err)
		}
		if v, err := r.sendDelta(r.begin("app", ""), out.Bytes()); !errors.Is(err, templates.ErrArchive) && !errors.Is(err, templates.ErrInvalid) {
			t.Errorf("%s: %+v, %v", what, v, err)
		}
	}
	r.expectStagingEmpty()
	r.expectPool(1)
}

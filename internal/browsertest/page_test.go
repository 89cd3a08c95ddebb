package browsertest_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/png"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/engine"
	"holdfast/internal/browsertest"
	"holdfast/internal/localdaemon"
	"holdfast/internal/localdaemon/daemontest"
	"holdfast/internal/tarball"
	"holdfast/metadata"
)

var update = flag.Bool("update", false, "write docs/ui.png anew")

const (
	picture       = "../../docs/ui.png"
	width, height = 1280, 960 // pixels
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// visit opens the page of a daemon and signs in with a key.
func visit(t *testing.T, b *browsertest.Browser, d *localdaemon.Daemon, key string) {
	t.Helper()
	b.Go(strings.TrimSuffix(d.URL, "/v0") + "/ui")
	b.Await("typeof $ === 'function' && !$('signin').hidden")
	b.Click("#key")
	b.Type(key)
	b.Press("Enter")
}

func noTroubles(t *testing.T, b *browsertest.Browser) {
	t.Helper()
	for _, trouble := range b.Troubles() {
		t.Errorf("the browser complains: %s", trouble)
	}
}

func create(t *testing.T, c *client.Client, name string, labels map[string]string, size int64) {
	t.Helper()
	_, err := c.CreateVolume(t.Context(), client.Volume{
		Metadata: client.VolumeMetadata{Name: name, Labels: labels}, Spec: client.VolumeSpec{Size: size, Filesystem: "ext4"},
	}, "")
	must(t, err)
}

func push(t *testing.T, c *client.Client, name string, files map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for file, text := range files {
		must(t, os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644))
	}
	plan, err := tarball.New(t.Context(), dir)
	must(t, err)
	var archive bytes.Buffer
	_, err = plan.WriteTo(&archive)
	must(t, err)
	_, err = c.PushTemplate(t.Context(), client.Push{Name: name, Archive: &archive, Length: plan.Length()})
	must(t, err)
}

const row = ".rows .line"

func rowOf(name string) string { return fmt.Sprintf(".rows .line[title=%q]", name) }

func TestPage(t *testing.T) {
	d := daemontest.Start(t)
	create(t, d.Client, "first", nil, 64)
	b := browsertest.Open(t, width, height)

	visit(t, b, d, "hf_this_is_no_key")
	b.Await("$('refused').textContent !== ''")
	if held := browsertest.Eval[int](b, "sessionStorage.length"); held != 0 {
		t.Error("a key that is not valid is kept")
	}
	if got := b.Troubles(); len(got) != 1 || !strings.Contains(got[0], "401") {
		t.Errorf("besides the refusal: %v", got)
	}

	visit(t, b, d, d.Key)
	b.Await("document.querySelector('" + rowOf("first") + "')")
	b.Await("document.querySelectorAll('#poolList .bar .used').length === 1")

	t.Run("what happens shows by itself", func(t *testing.T) {
		b.Await("$('live').textContent.includes('live')")
		create(t, d.Client, "second", nil, 32)
		b.Await("document.querySelector('" + rowOf("second") + "') && $('count').textContent === '2'")
		b.Await("$('events').textContent.includes('second')")
		push(t, d.Client, "tools", map[string]string{"a": "1"})
		b.Await("$('templates').textContent.includes('tools')")
		_, err := d.Client.DeleteVolume(t.Context(), "second")
		must(t, err)
		b.Await("!document.querySelector('" + rowOf("second") + "') && $('count').textContent === '1'")
	})

	t.Run("tenants' text stays text", func(t *testing.T) {
		const evil = `<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>`
		_, err := d.Client.CreateVolume(t.Context(), client.Volume{
			Metadata: client.VolumeMetadata{Name: "evil", DisplayName: evil[:60], Labels: map[string]string{"note": evil}}, Spec: client.VolumeSpec{Size: 16},
		}, "")
		must(t, err)
		b.Click(rowOf("evil"))
		b.Await("!$('detail').hidden && $('detail').textContent.includes('onerror')")
		if browsertest.Eval[bool](b, "!!window.hacked || document.querySelectorAll('img, main script').length > 0") {
			t.Error("a label became markup")
		}
	})

	t.Run("an attachment shows and can be taken away", func(t *testing.T) {
		at := filepath.Join(d.State, "attach", "data")
		must(t, os.MkdirAll(at, 0o755))
		_, err := d.Client.Attach(t.Context(), "first", client.Attachment{Holder: "sandbox:s1", Target: client.Target{Type: "host", Path: at}})
		must(t, err)
		b.Click(rowOf("first"))
		b.Await("$('detail').textContent.includes('sandbox:s1') && document.querySelector('" + rowOf("first") + "').textContent.includes('sandbox:s1')")
		b.ClickUntil("#detail li.head button", "$('ask').open")
		b.Click("#yes")
		b.Await("!$('detail').textContent.includes('Attachments')")
		if left, err := d.Client.Attachments(t.Context(), "first"); err != nil || len(left) != 0 {
			t.Errorf("attachments: %v, %v", left, err)
		}
	})

	t.Run("grow and delete", func(t *testing.T) {
		b.ClickUntil("#detail button:not(.danger):not([aria-label])", "$('ask').open && $('yes').disabled")
		b.Type("32")
		b.Await("$('yes').disabled")
		b.Click("#ask button[value=no]")
		b.Await("!$('ask').open")
		b.ClickUntil("#detail button:not(.danger):not([aria-label])", "$('ask').open")
		b.Type("128")
		b.Click("#yes")
		b.Await("document.querySelector('" + rowOf("first") + "').textContent.includes('128 MiB')")
		b.ClickUntil("#detail button.danger", "$('ask').open && $('yes').disabled")
		b.Type("first")
		b.Click("#yes")
		b.Await("!document.querySelector('" + rowOf("first") + "') && $('detail').hidden")
		if _, err := d.Client.Volume(t.Context(), "first"); !client.IsNotFound(err) {
			t.Errorf("after the deletion: %v", err)
		}
	})
	t.Run("a question asked right after another keeps its answer", func(t *testing.T) {
		if !browsertest.Eval[bool](b, `(async () => {
			const first = ask('first', null);
			$('ask').close('no');
			const second = ask('second', null);
			let answered = false;
			second.then(() => { answered = true; });
			for (let turns = 0; turns < 5; turns++) await new Promise(next => setTimeout(next));
			const early = answered;
			$('ask').close('yes');
			return await first === null && await second !== null && !early;
		})()`) {
			t.Error("the closing of the first dialog answered the second question")
		}
	})

	troubles := b.Troubles()
	for _, trouble := range troubles {
		if !strings.Contains(trouble, "404") { // a look at a volume that has just been deleted
			t.Errorf("the browser complains: %s", trouble)
		}
	}

	t.Run("a reader's key changes nothing", func(t *testing.T) {
		key, err := d.Client.CreateKey(t.Context(), client.NewKey{Name: "looks", Role: "reader"})
		must(t, err)
		b.Click("#leave")
		b.Await("!$('signin').hidden && document.querySelector('main').hidden")
		if browsertest.Eval[int](b, "sessionStorage.length") != 0 {
			t.Error("the key is kept after signing out")
		}
		visit(t, b, d, key.Secret)
		b.Click(rowOf("evil"))
		b.Await("!$('detail').hidden")
		if n := browsertest.Eval[int](b, "document.querySelectorAll('#detail button:not([aria-label])').length"); n != 0 {
			t.Errorf("%d buttons that a reader may not press", n)
		}
		if !browsertest.Eval[bool](b, "$('pools').hidden") {
			t.Error("the node's pools are shown to a tenant")
		}
		noTroubles(t, b)
	})
}

// TestPools: a pool that is not there says why, and a volume where it is.
func TestPools(t *testing.T) {
	dir := t.TempDir()
	broken := filepath.Join(dir, "broken")
	must(t, os.WriteFile(broken, nil, 0o600)) // not a directory
	d := daemontest.Start(t, "--pool", "second=sparse:"+filepath.Join(dir, "second")+",broken=sparse:"+broken)
	_, err := d.Client.CreateVolume(t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: "elsewhere"}, Spec: client.VolumeSpec{Size: 16, Pool: "second"}}, "")
	must(t, err)
	b := browsertest.Open(t, width, height)
	visit(t, b, d, d.Key)
	b.Await("document.querySelectorAll('#poolList .pool').length === 3 && document.querySelectorAll('#poolList .bar').length === 2")
	b.Await("document.querySelector('#poolList .pool:last-child .bad').textContent.includes('not available: ')")
	if text := browsertest.Eval[string](b, "$('poolList').textContent"); strings.Contains(text, "NaN") || strings.Contains(text, "undefined") {
		t.Errorf("the pools: %s", text)
	}
	b.Click(rowOf("elsewhere"))
	b.Await("!$('detail').hidden && [...document.querySelectorAll('#detail dt')].some(t => t.textContent === 'Pool' && t.nextSibling.textContent === 'second')")
	noTroubles(t, b)
}

// TestPicture keeps the picture in the docs true: a small node, one volume open.
func TestPicture(t *testing.T) {
	d := daemontest.Start(t)
	push(t, d.Client, "python-3-12", map[string]string{"main.py": strings.Repeat("print(1)\n", 90_000)})
	push(t, d.Client, "node-22", map[string]string{"index.js": "0\n"})
	push(t, d.Client, "node-22", map[string]string{"index.js": "1\n"})
	live(t, d)
	b := browsertest.Open(t, width, height)
	visit(t, b, d, d.Key)
	b.Await("document.querySelectorAll('#poolList .bar').length === 1 && document.querySelectorAll('#templates details').length === 2")
	b.Click(rowOf("agent-7"))
	b.Await("$('detail').textContent.includes('sandbox:agent-7')")
	screenshot(t, b)
	noTroubles(t, b)
}

// TestTenThousandVolumes: the page stays quick to the hand and small in memory.
func TestTenThousandVolumes(t *testing.T) {
	const many = 10_000
	d := daemontest.Start(t, "--overprovision", "8")
	seed(t, d, many)
	b := browsertest.Open(t, width, height)
	visit(t, b, d, d.Key)
	b.Await(fmt.Sprintf("$('count').textContent === '%d' && document.querySelectorAll('%s').length > 10", many, row))

	// Down to the oldest: pages are loaded on the way, rows out of sight do not exist.
	b.Await("(volumes.loading || ($('rows').scrollTop = $('rows').scrollHeight), !volumes.more && volumes.items.length === " + fmt.Sprint(many) + ")")
	b.Await("document.querySelector('" + rowOf("seeded-000000") + "')")
	if n := browsertest.Eval[int](b, "document.querySelectorAll('"+row+"').length"); n > 60 {
		t.Errorf("%d rows exist", n)
	}
	if n := browsertest.Eval[int](b, "new Set(volumes.items.map(v => v.metadata.name)).size"); n != many {
		t.Errorf("%d different volumes", n)
	}

	b.Click("#search")
	b.Type("seeded-004242")
	b.Await("document.querySelectorAll('" + row + "').length === 1 && document.querySelector('" + rowOf("seeded-004242") + "')")
	b.Click("#rows .line")
	b.Await("$('detail').textContent.includes('seeded-004242')")
	noTroubles(t, b)
}

// seed puts records of volumes into a daemon's store while it is down.
func seed(t *testing.T, d *localdaemon.Daemon, n int) {
	t.Helper()
	must(t, d.Stop())
	store, err := metadata.Open(filepath.Join(d.State, "meta", "store"), metadata.Options{
		Log: slog.New(slog.DiscardHandler), SequenceFile: filepath.Join(d.State, "sequence"),
	})
	must(t, err)
	must(t, errors.Join(engine.SeedRecords(t.Context(), store, "main", n, time.Now().Add(-time.Hour)), store.Close()))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must(t, d.Restart(ctx))
}

// live makes the volumes that a picture is of, one of them attached.
func live(t *testing.T, d *localdaemon.Daemon) {
	t.Helper()
	for _, v := range []struct {
		name, template string
		size           int64
	}{
		{"postgres-main", "", 512}, {"registry-cache", "", 256}, {"scratch", "", 64}, {"build-0", "node-22:1", 64}, {"build-1", "node-22", 64}, {"build-2", "node-22", 64},
		{"agent-1", "python-3-12", 32}, {"agent-2", "python-3-12", 32}, {"agent-3", "python-3-12", 32}, {"agent-4", "python-3-12", 32}, {"agent-5", "python-3-12", 32},
		{"agent-6", "node-22:latest", 128}, {"agent-7", "python-3-12:latest", 256},
	} {
		_, err := d.Client.CreateVolume(t.Context(), client.Volume{
			Metadata: client.VolumeMetadata{Name: v.name, Labels: map[string]string{"env": "demo"}}, Spec: client.VolumeSpec{Size: v.size, Template: v.template},
		}, "")
		must(t, err)
	}
	at := filepath.Join(d.State, "attach", "agent-7")
	must(t, os.MkdirAll(at, 0o755))
	a, err := d.Client.Attach(t.Context(), "agent-7", client.Attachment{Holder: "sandbox:agent-7", Target: client.Target{Type: "host", Path: at}})
	must(t, err)
	t.Cleanup(func() {
		if _, err := d.Client.Detach(context.WithoutCancel(t.Context()), "agent-7", a.ID); err != nil {
			t.Error(err)
		}
	})
}

// screenshot looks whether the picture shows something, and keeps it with -update.
func screenshot(t *testing.T, b *browsertest.Browser) {
	t.Helper()
	b.Do("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": "light"}}})
	shot := b.Screenshot()
	if colours := coloursOf(t, shot); colours < 50 {
		t.Errorf("the picture has %d colours: is it empty?", colours)
	}
	if *update {
		must(t, os.WriteFile(picture, shot, 0o644))
	}
	kept, err := os.ReadFile(picture)
	must(t, err)
	if coloursOf(t, kept) < 50 {
		t.Errorf("%s shows nothing: go test -run Picture -update", picture)
	}
}

func coloursOf(t *testing.T, shot []byte) int {
	t.Helper()
	img, err := png.Decode(bytes.NewReader(shot))
	must(t, err)
	if img.Bounds().Size() != (image.Point{X: width, Y: height}) {
		t.Errorf("the picture is %v", img.Bounds())
	}
	seen := map[any]bool{}
	for y := range img.Bounds().Dy() {
		for x := range img.Bounds().Dx() {
			seen[img.At(x, y)] = true
		}
	}
	return len(seen)
}

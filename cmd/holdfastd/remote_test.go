package main_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/templates/remote"
)

// store is an ordinary web server over a directory, which can be away.
type store struct {
	*httptest.Server
	dir  string
	away atomic.Bool
	asks atomic.Int64 // while it was away
}

func newStore(t *testing.T) *store {
	t.Helper()
	s := &store{dir: t.TempDir()}
	files := http.FileServer(http.Dir(s.dir))
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.away.Load() {
			s.asks.Add(1)
			http.Error(w, "not now", http.StatusServiceUnavailable)
			return
		}
		files.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

// publish writes a template's version into the store and gives its manifest's URL and
// digest.
func (n *node) publish(s *store, template string, p client.Publication) (manifest string, f remote.Files) {
	n.t.Helper()
	stream, err := n.TemplateImage(n.t.Context(), template, p)
	must(n.t, err)
	f, err = remote.Publish(s.dir, stream, nil)
	must(n.t, err)
	must(n.t, stream.Close())
	return s.URL + "/" + filepath.Base(f.Manifest), f
}

// TestRemoteTemplates: a volume of a version whose bytes are in a store is made while
// the store is away, and is served; reads wait until the store is back, over the end of
// the daemon too; then all of it comes here and it is an ordinary volume.
func TestRemoteTemplates(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	s := newStore(t)
	n := newNode(t, "--worker", buildWorker(t), "--remote-templates", s.URL+"/")
	ctx := t.Context()
	content := make([]byte, 12<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	tree := t.TempDir()
	must(t, os.WriteFile(filepath.Join(tree, "large"), content, 0o644))
	n.push("tools", tree)
	manifest, files := n.publish(s, "tools", client.Publication{Size: 64})
	version, err := n.RegisterTemplate(ctx, "far", client.Registration{Manifest: manifest, Digest: files.Digest})
	must(t, err)
	if r := version.Remote; version.Status != "READY" || r == nil || "http://"+r.Host != s.URL || r.Size != 64 {
		t.Fatalf("registered: %+v, %+v", version, version.Remote)
	}
	if again, err := n.RegisterTemplate(ctx, "far", client.Registration{Manifest: manifest, Digest: files.Digest}); err != nil || again.VersionID != version.VersionID {
		t.Errorf("registered again: %+v, %v", again, err)
	}

	s.away.Store(true)
	n.create("v", client.VolumeSpec{Template: "far"})
	a, err := n.Attach(ctx, "v", client.Attachment{Holder: "agent:a", Target: client.Target{Type: "export", Protocol: "nbd"}})
	must(t, err)
	image, err := os.ReadFile(files.Image)
	must(t, err)
	disk := dialDisk(t, a.Socket)
	if disk.size != int64(len(image)) {
		t.Fatalf("it has %d bytes and the image %d", disk.size, len(image))
	}
	hole := int64(bytes.Index(image, content[:4096])) // it came from the store
	disk.ask(hole, 4096)
	eventually(t, "its reader waits for the store", func() bool {
		io, err := n.IO(ctx, "v")
		return err == nil && slices.ContainsFunc(io.Waits, func(w client.Wait) bool {
			return w.Cause == "hydration" && w.Requests == 1 && strings.Contains(w.Text, "does not answer since")
		})
	})
	n.kill()
	n.start() // after an unclean stop: versions are verified before they are used, without the store
	late := n.create("late", client.VolumeSpec{Template: "far", Size: 128})
	if late.State.Sizes.Pending == "" {
		t.Errorf("a larger volume: %+v", late.State.Sizes)
	}
	s.away.Store(false)
	if got := disk.take(4096); !bytes.Equal(got, image[hole:hole+4096]) {
		t.Error("the store is back, and a reader gets something else")
	}
	for at := int64(4096); at < disk.size; at += 1 << 20 { // the first block has the filesystem's identity
		k := min(1<<20, disk.size-at)
		disk.ask(at, int(k))
		if got := disk.take(int(k)); !bytes.Equal(got, image[at:at+k]) {
			t.Fatalf("it differs from the image in the MiB at %d", at)
		}
	}
	eventually(t, "all of it is here", func() bool {
		v, err := n.Volume(ctx, "v")
		return err == nil && slices.ContainsFunc(v.Events, func(e client.VolumeEvent) bool {
			return e.Type == "hydration" && strings.Contains(e.Message, "All its blocks are on this host")
		})
	})
	must(t, disk.Close())
	_, err = n.Detach(ctx, "v", a.ID)
	must(t, err)
	_, err = n.DeleteTemplate(ctx, "far") // volumes stay, also one that is not whole yet
	must(t, err)
	n.holdsMounted("late", "large", content)
	eventually(t, "its filesystem has grown", func() bool {
		v, err := n.Volume(ctx, "late")
		return err == nil && v.State.Sizes.Pending == "" && v.State.Sizes.Filesystem == 128<<20
	})
	s.away.Store(true)
	a, err = n.Attach(ctx, "v", client.Attachment{Holder: "agent:a", Target: client.Target{Type: "export", Protocol: "nbd"}})
	must(t, err)
	disk = dialDisk(t, a.Socket)
	disk.ask(hole, 4096)
	if got := disk.take(4096); !bytes.Equal(got, image[hole:hole+4096]) {
		t.Error("without the store it differs from the image")
	}
	must(t, disk.Close())
	v, err := n.Volume(ctx, "v")
	must(t, err)
	if v.State.Sizes.Hydration != nil {
		t.Errorf("it is whole, and %+v", v.State.Sizes.Hydration)
	}
}

// holdsMounted attaches a volume to the host and compares a file in it. A volume that is
// being hydrated is asked for again.
func (n *node) holdsMounted(volume, file string, want []byte) {
	n.t.Helper()
	at := filepath.Join(n.state, "attach", volume)
	must(n.t, os.MkdirAll(at, 0o755))
	var a client.Attachment
	eventually(n.t, volume+" is mounted", func() bool {
		var err error
		a, err = n.Attach(n.t.Context(), volume, client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}})
		if err != nil && !strings.Contains(err.Error(), "is being hydrated") {
			n.t.Fatal(err)
		}
		return err == nil
	})
	if got, err := os.ReadFile(filepath.Join(at, file)); err != nil || !bytes.Equal(got, want) {
		n.t.Errorf("%s: %d bytes of %s, %v", volume, len(got), file, err)
	}
	_, err := n.Detach(n.t.Context(), volume, a.ID)
	must(n.t, err)
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// disk is a client of an NBD server's default export.
type disk struct {
	net.Conn
	t    *testing.T
	size int64
}

func dialDisk(t *testing.T, socket string) *disk {
	t.Helper()
	d := &disk{Conn: greeted(t, socket), t: t}
	d.say(uint32(3), []byte("IHAVEOPT"), uint32(1), uint32(0)) // fixed newstyle, no zeroes; EXPORT_NAME ""
	var answer struct {
		Size  uint64
		Flags uint16
	}
	must(t, binary.Read(d, binary.BigEndian, &answer))
	d.size = int64(answer.Size) //nolint:gosec // a small one
	return d
}

func (d *disk) say(parts ...any) {
	d.t.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		must(d.t, binary.Write(&b, binary.BigEndian, p))
	}
	_, err := d.Write(b.Bytes())
	must(d.t, err)
}

// ask sends a read, whose answer take takes.
func (d *disk) ask(at int64, n int) {
	d.t.Helper()
	d.say(uint32(0x25609513), uint16(0), uint16(0), uint64(7), uint64(at), uint32(n)) //nolint:gosec // small numbers
}

func (d *disk) take(n int) []byte {
	d.t.Helper()
	must(d.t, d.SetReadDeadline(time.Now().Add(patience)))
	var answer struct {
		Magic, Error uint32
		Cookie       uint64
	}
	must(d.t, binary.Read(d, binary.BigEndian, &answer))
	if answer.Magic != 0x67446698 || answer.Error != 0 || answer.Cookie != 7 {
		d.t.Fatalf("answered %+v", answer)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(d, b)
	must(d.t, err)
	return b
}

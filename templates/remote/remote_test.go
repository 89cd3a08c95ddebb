package remote

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev/filesystem"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stream is one of an image with data at both ends, and what it holds.
func stream(t *testing.T, h Head) (sent, image []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(h.Size))
	for _, at := range []int64{0, h.Size/2 + 5, h.Size - 7} {
		_, err = f.WriteAt([]byte("content"), at)
		must(t, err)
	}
	var b bytes.Buffer
	must(t, Send(t.Context(), &b, h, f))
	image, err = os.ReadFile(f.Name())
	must(t, err)
	return b.Bytes(), image
}

var head = Head{Template: "app", Version: "v1.2", Filesystem: filesystem.Ext4, Size: 5 << 20}

// TestPublish: what is published is what was sent, the same each time, and can be found
// and read again; of a stream that is cut anywhere nothing is published.
func TestPublish(t *testing.T) {
	sent, image := stream(t, head)
	if len(sent) > 1<<20 {
		t.Errorf("a sparse image took %d bytes", len(sent))
	}
	dir := t.TempDir()
	f, err := Publish(dir, bytes.NewReader(sent), nil)
	must(t, err)
	for range 2 { // over what is there
		again, err := Publish(dir, bytes.NewReader(sent), nil)
		if err != nil || again != f {
			t.Errorf("%+v, then %+v, %v", f, again, err)
		}
	}
	larger := head
	larger.Size *= 2
	other, _ := stream(t, larger)
	if _, err := Publish(dir, bytes.NewReader(other), nil); !errors.Is(err, ErrOther) {
		t.Errorf("another image in its place: %v", err)
	}
	changed := bytes.Replace(sent, []byte("content"), []byte("CONTENT"), 2) // the first is a word of the head
	if _, err := Publish(dir, bytes.NewReader(changed), nil); !errors.Is(err, ErrOther) {
		t.Errorf("other bytes in its place: %v", err)
	}
	if got, err := os.ReadFile(f.Image); err != nil || !bytes.Equal(got, image) {
		t.Errorf("the image differs: %v", err)
	}
	if names, err := filepath.Glob(dir + "/*"); err != nil || len(names) != 3 {
		t.Errorf("%q, %v", names, err)
	}
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer server.Close()
	s, err := NewStores([]string{server.URL + "/"})
	must(t, err)
	p, err := s.Find(t.Context(), server.URL+"/app-v1.2.json", f.Digest)
	must(t, err)
	var chunks bytes.Buffer
	must(t, s.FetchChunks(t.Context(), p, &chunks))
	r, err := s.Open(t.Context(), p, bytes.NewReader(chunks.Bytes()))
	must(t, err)
	if got, err := io.ReadAll(io.NewSectionReader(r, 0, 6<<20)); err != nil || !bytes.Equal(got, image) {
		t.Errorf("read from the store it differs: %v", err)
	}
	for cut := 0; cut < len(sent); cut += 1 + len(sent)/400 {
		empty := t.TempDir()
		if _, err := Publish(empty, bytes.NewReader(sent[:cut]), nil); !errors.Is(err, ErrStream) {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		if left, _ := os.ReadDir(empty); len(left) > 0 {
			t.Fatalf("cut at %d: %s is left", cut, left[0].Name())
		}
	}
	for _, h := range []Head{{Template: "../etc", Version: "1", Filesystem: "ext4", Size: 1 << 20}, {Template: "a", Version: "1", Filesystem: "zfs", Size: 1 << 20}, {Template: "a", Version: "1", Filesystem: "ext4", Size: 2<<20 + 1}} {
		bad, _ := stream(t, h)
		if _, err := Publish(t.TempDir(), bytes.NewReader(bad), nil); !errors.Is(err, ErrStream) {
			t.Errorf("%+v: %v", h, err)
		}
	}
}

// TestStoresAllow: only what is below a prefix that was listed, and nothing that may be
// read in two ways or holds a secret.
func TestStoresAllow(t *testing.T) {
	s, err := NewStores([]string{"https://store.example/holdfast/", "http://10.0.0.1:9000/"})
	must(t, err)
	for url, want := range map[string]error{
		"https://store.example/holdfast/a/b.json":                     nil,
		"https://STORE.example/holdfast/b.json":                       nil,
		"http://10.0.0.1:9000/b.json":                                 nil,
		"http://store.example/holdfast/b.json":                        ErrNotAllowed,
		"https://store.example:8443/holdfast/b.json":                  ErrNotAllowed,
		"https://store.example.evil/holdfast/b.json":                  ErrNotAllowed,
		"https://store.example/holdfast-other/b.json":                 ErrNotAllowed,
		"https://store.example/b.json":                                ErrNotAllowed,
		"http://169.254.169.254/latest/meta-data/":                    ErrNotAllowed,
		"https://store.example/holdfast/../secret/b.json":             ErrInvalidURL,
		"https://store.example/holdfast/%2e%2e/secret/b.json":         ErrInvalidURL,
		"https://store.example/holdfast/a%2Fb.json":                   ErrInvalidURL,
		"https://store.example/holdfast//b.json":                      ErrInvalidURL,
		"https://u:secret@store.example/holdfast/b.json":              ErrInvalidURL,
		"https://store.example/holdfast/b.json?sig=secret":            ErrInvalidURL,
		"https://store.example/holdfast/b.json?":                      ErrInvalidURL,
		"https://store.example/holdfast/b.json#secret":                ErrInvalidURL,
		"file:///etc/passwd":                                          ErrInvalidURL,
		"//store.example/holdfast/b.json":                             ErrInvalidURL,
		"":                                                            ErrInvalidURL,
		"https://store.example/holdfast/" + strings.Repeat("x", 1024): ErrInvalidURL,
	} {
		err := s.Check(url)
		if !errors.Is(err, want) || (err != nil) != (want != nil) {
			t.Errorf("%.80s: %v, want %v", url, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret@") || err != nil && strings.Contains(err.Error(), "sig=") {
			t.Errorf("the error tells a secret: %v", err)
		}
	}
	for _, bad := range []string{"https://store.example/holdfast", "https://store.example", "ftp://store.example/", "store.example/", "https://a:b@store.example/", "https://store.example/?a"} {
		if _, err := NewStores([]string{bad}); err == nil {
			t.Errorf("%s is a prefix", bad)
		}
	}
	none, err := NewStores(nil)
	must(t, err)
	if err := none.Check("https://store.example/a"); !errors.Is(err, ErrNotAllowed) || !strings.Contains(err.Error(), "remote_templates") {
		t.Errorf("with none listed: %v", err)
	}
}

// TestStoreSendsSomethingElse: nothing is believed that has another digest, is too much,
// or comes from somewhere else.
func TestStoreSendsSomethingElse(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "inner") }))
	defer elsewhere.Close()
	m := Manifest{Head: head, Image: "i", Chunks: "c", ChunksDigest: FormatDigest(sha256.Sum256(nil))}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/good.json":
			_, _ = w.Write(m.Encode())
		case "/large.json":
			_, _ = w.Write(make([]byte, MaxManifest+1))
		case "/away.json":
			http.Redirect(w, r, elsewhere.URL+"/good.json", http.StatusFound)
		default:
			http.NotFound(w, r)
		}
	}))
	defer server.Close()
	s, err := NewStores([]string{server.URL + "/"})
	must(t, err)
	good := FormatDigest(sha256.Sum256(m.Encode()))
	p, err := s.Find(t.Context(), server.URL+"/good.json", good)
	if err != nil || p.ImageURL != server.URL+"/i" || p.ChunksURL != server.URL+"/c" || p.Size != head.Size {
		t.Errorf("%+v, %v", p, err)
	}
	for name, c := range map[string]struct {
		digest string
		want   error
	}{
		"/good.json":  {FormatDigest(sha256.Sum256([]byte("other"))), ErrStore},
		"/large.json": {FormatDigest(sha256.Sum256(make([]byte, MaxManifest+1))), ErrStore},
		"/away.json":  {FormatDigest(sha256.Sum256([]byte("inner"))), ErrStore},
		"/none.json":  {good, ErrStore},
		"/other.json": {"sha256:12", ErrManifest},
	} {
		if _, err := s.Find(t.Context(), server.URL+name, c.digest); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Find(over, server.URL+"/good.json", good); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that is over: %v", err)
	}
}

// TestSlowStore: that a store takes too long is not that the caller has no time left.
func TestSlowStore(t *testing.T) {
	for _, cause := range []error{context.DeadlineExceeded, context.Canceled} {
		err := failed(t.Context(), "https://store.example/i", &url.Error{Op: "Get", URL: "https://store.example/i", Err: cause})
		if !errors.Is(err, ErrStore) || errors.Is(err, cause) || !strings.Contains(err.Error(), cause.Error()) {
			t.Errorf("%v", err)
		}
	}
}

func TestManifestRefused(t *testing.T) {
	good := Manifest{Head: head, Image: "i", Chunks: "c", ChunksDigest: FormatDigest(sha256.Sum256(nil))}
	if m, err := DecodeManifest(good.Encode()); err != nil || m.Image != "i" || m.Head != head {
		t.Fatalf("%+v, %v", m, err)
	}
	for _, change := range []func(m *Manifest){
		func(m *Manifest) { m.Image = "../i" }, func(m *Manifest) { m.Chunks = "http://x/c" }, func(m *Manifest) { m.Image = "" },
		func(m *Manifest) { m.ChunksDigest = "sha256:" }, func(m *Manifest) { m.Size = -1 }, func(m *Manifest) { m.Size = 1<<20 + 1 },
		func(m *Manifest) { m.Size = 1 << 62 }, func(m *Manifest) { m.Filesystem = "none" }, func(m *Manifest) { m.Entries = -1 },
	} {
		m := good
		change(&m)
		if _, err := DecodeManifest(m.Encode()); !errors.Is(err, ErrManifest) {
			t.Errorf("%+v: %v", m, err)
		}
	}
	for _, text := range []string{"", "{", "[]", string(good.Encode()) + "{}", strings.Replace(string(good.Encode()), `"format": 1`, `"format": 2`, 1)} {
		if _, err := DecodeManifest([]byte(text)); !errors.Is(err, ErrManifest) {
			t.Errorf("%.40q: %v", text, err)
		}
	}
}

package main_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// wire is a way to a daemon that counts the bytes that go to it.
type wire struct {
	net.Listener
	sent atomic.Int64
}

func (w *wire) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	return counted{c, w}, err
}

type counted struct {
	net.Conn
	w *wire
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.w.sent.Add(int64(n))
	return n, err
}

// newWire puts a counter before a daemon; edit may change its answers.
func newWire(t *testing.T, n *node, edit func(*http.Response) error) (*wire, string) {
	t.Helper()
	address, err := os.ReadFile(filepath.Join(n.state, "listen"))
	must(t, err)
	target := &url.URL{Scheme: "http", Host: strings.TrimSpace(string(address))}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	w := &wire{Listener: l}
	server := httptest.NewUnstartedServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.Out.Host = r.In.Host }, ModifyResponse: edit,
	})
	server.Listener = w
	server.Start()
	t.Cleanup(server.Close)
	return w, server.URL + "/v0"
}

// TestPushOverTheWire counts what a push takes: the first one whole, the second
// what changed, an unchanged one next to nothing; and the whole archive again from a
// server that does not know better.
func TestPushOverTheWire(t *testing.T) {
	n := newNode(t)
	key, err := os.ReadFile(filepath.Join(n.state, "dev.key"))
	must(t, err)
	dir := t.TempDir()
	random := rand.NewChaCha8([32]byte{3})
	write := func(i int) {
		b := make([]byte, 20_000)
		_, _ = random.Read(b)
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%04d", i)), b, 0o644))
	}
	const files = 1000
	for i := range files {
		write(i)
	}
	w, address := newWire(t, n, nil)
	push := func(address string, w *wire) int64 {
		t.Helper()
		before := w.sent.Load()
		cmd := exec.Command(holdfast, "template", "push", "app", dir, "--quiet")
		cmd.Env = append(os.Environ(), "HOLDFAST_URL="+address, "HOLDFAST_KEY="+strings.TrimSpace(string(key)), "HOLDFAST_WORKSPACE=main", "HOLDFAST_SOCKET=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("push: %v\n%s", err, out)
		}
		return w.sent.Load() - before
	}
	first := push(address, w)
	if first < files*20_000 {
		t.Fatalf("the first push took %d bytes", first)
	}
	unchanged := push(address, w)
	for i := 0; i < files; i += 100 {
		write(i)
	}
	changed := push(address, w)
	t.Logf("of the first push's bytes: unchanged %.3f %%, 1 %% changed %.2f %%", 100*float64(unchanged)/float64(first), 100*float64(changed)/float64(first))
	if unchanged*500 > first {
		t.Errorf("an unchanged push took %d bytes, the first %d", unchanged, first)
	}
	if changed*10 > first {
		t.Errorf("a push of 1 %% changes took %d bytes, the first %d", changed, first)
	}
	archive, err := n.PullTemplate(t.Context(), "app", "3")
	must(t, err)
	_, err = io.Copy(io.Discard, archive)
	must(t, err)
	must(t, archive.Close())

	// A server without the extension gets everything.
	w, address = newWire(t, n, func(r *http.Response) error {
		r.Header.Del("X-Holdfast-Upload-Delta")
		return nil
	})
	if plain := push(address, w); plain < files*20_000 {
		t.Errorf("a server that cannot know took %d bytes", plain)
	}
	// So does one that has lost what it said it had.
	w, address = newWire(t, n, func(r *http.Response) error {
		if strings.HasSuffix(r.Request.URL.Path, "/known") {
			r.StatusCode, r.Status = http.StatusNotFound, "404 Not Found"
		}
		return nil
	})
	if plain := push(address, w); plain < files*20_000 {
		t.Errorf("a server that does not answer took %d bytes", plain)
	}
	h, err := n.TemplateHistory(t.Context(), "app")
	must(t, err)
	if len(h.Versions) != 5 || h.Versions[1].Digest == "" {
		t.Errorf("%d versions", len(h.Versions))
	}
	for i, of := range []int{0, 2, 2} {
		if a, b := h.Versions[[]int{1, 3, 4}[i]], h.Versions[of]; a.ContentSize != b.ContentSize || a.Status != "READY" {
			t.Errorf("version %s is not as %s", a.Name, b.Name)
		}
	}
}

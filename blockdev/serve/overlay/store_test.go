package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

// TestStoreClient: it follows where its operator allows, and not one path further, tells
// nobody who was asked before, goes through no proxy, keeps to its connections, and what
// it complains of has no secret in it.
func TestStoreClient(t *testing.T) {
	const secret = "s3cr3t"
	m := remoteBase()
	var connections, elsewhere atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/cdn/") {
			elsewhere.Add(1)
		}
		if r.Referer() != "" {
			t.Errorf("it says that it comes from %s", r.Referer())
		}
		http.ServeContent(w, r, "base", time.Time{}, bytes.NewReader(m))
	}))
	t.Cleanup(other.Close)
	var outside atomic.Int64
	store := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/base/moved":
			http.Redirect(w, r, "/base/there?"+r.URL.RawQuery, http.StatusPermanentRedirect)
		case "/base/cdn":
			http.Redirect(w, r, other.URL+"/cdn/base?"+r.URL.RawQuery, http.StatusFound)
		case "/base/elsewhere":
			http.Redirect(w, r, other.URL+"/cdnot/base?"+r.URL.RawQuery, http.StatusFound)
		case "/base/out": // of the prefix, on the host that is allowed
			http.Redirect(w, r, "/admin?"+r.URL.RawQuery, http.StatusFound)
		case "/base/up":
			w.Header().Set("Location", "http://"+r.Host+"/base/%2e%2e/admin?"+r.URL.RawQuery)
			w.WriteHeader(http.StatusFound)
		case "/base/as":
			http.Redirect(w, r, "http://root:"+secret+"@"+r.Host+"/base/there", http.StatusFound)
		case "/base/secure":
			http.Redirect(w, r, "https://"+r.Host+"/base/there?"+r.URL.RawQuery, http.StatusFound)
		case "/admin":
			outside.Add(1)
		default:
			http.ServeContent(w, r, "base", time.Time{}, bytes.NewReader(m))
		}
	}))
	store.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			connections.Add(1)
		}
	}
	store.Start()
	t.Cleanup(store.Close)
	allowed, err := overlay.ParsePrefixes([]string{store.URL + "/base/", other.URL + "/cdn/"})
	must(t, err)
	address := strings.Replace(store.URL, "http://", "http://user:"+secret+"@", 1)
	fetch := func(path string) error {
		client := overlay.StoreClient(nil, nil, allowed.Allow)
		defer client.CloseIdleConnections()
		p := make([]byte, chunk)
		err := overlay.HTTPFetch(client, address+path+"?key="+secret)(t.Context(), p, chunk)
		if err == nil && !bytes.Equal(p, m[chunk:2*chunk]) {
			t.Errorf("%s: other bytes", path)
		}
		return err
	}
	for _, path := range []string{"/base/there", "/base/moved", "/base/cdn"} {
		must(t, fetch(path))
	}
	for _, path := range []string{"/base/elsewhere", "/base/secure", "/base/out", "/base/up", "/base/as"} {
		if err := fetch(path); err == nil || !strings.Contains(err.Error(), "not below a prefix") || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if n, m := elsewhere.Load(), outside.Load(); n+m != 0 {
		t.Errorf("what is not allowed was asked %d and %d times", n, m)
	}
	client := overlay.StoreClient(nil, nil, nil)
	if err := overlay.HTTPFetch(client, store.URL+"/base/moved")(t.Context(), make([]byte, chunk), 0); err == nil || !strings.Contains(err.Error(), "not below a prefix") {
		t.Errorf("a redirect where none is allowed: %v", err)
	}
	defer client.CloseIdleConnections()
	if transport, ok := client.Transport.(*http.Transport); !ok || transport.Proxy != nil {
		t.Error("it may go through a proxy")
	}
	connections.Store(0)
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() { must(t, overlay.HTTPFetch(client, store.URL)(t.Context(), make([]byte, chunk), 0)) })
	}
	all.Wait()
	if n := connections.Load(); n > 16 {
		t.Errorf("%d connections", n)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, failing := range map[string]error{
		"nobody there": overlay.HTTPFetch(client, "http://user:"+secret+"@127.0.0.1:1/base?key="+secret)(t.Context(), make([]byte, 1), 0),
		"no name":      overlay.HTTPFetch(client, "http://user:"+secret+"@no-such.invalid/base?key="+secret)(t.Context(), make([]byte, 1), 0),
		"no address":   overlay.HTTPFetch(client, "http://x/%zz?key="+secret)(t.Context(), make([]byte, 1), 0),
		"ended":        overlay.HTTPFetch(client, address+"/base/there?key="+secret)(ended, make([]byte, 1), 0),
	} {
		if failing == nil || strings.Contains(failing.Error(), secret) {
			t.Errorf("%s: %v", name, failing)
		}
	}
}

// TestPrefixes: one allows what is below it, and nothing that only looks like that.
func TestPrefixes(t *testing.T) {
	p, err := overlay.ParsePrefixes([]string{"https://store.example/a/", "http://[::1]:8080/"})
	must(t, err)
	for address, want := range map[string]bool{
		"https://store.example/a/b": true, "https://STORE.example:443/a/b/c?signed=1": true, "http://[::1]:8080/x": true, "https://store.example/a/": true,
		"https://store.example/a": false, "https://store.example/ab": false, "http://store.example/a/b": false, "https://store.example:444/a/b": false,
		"https://store.example/a/../b": false, "https://store.example/a/%2e%2e/b": false, "https://store.example/a/x%2fy": false, "https://store.example/a//b": false,
		"https://u@store.example/a/b": false, "https://store.example.evil/a/b": false, "http://[::1]/x": false, "/a/b": false, "": false,
	} {
		u, err := url.Parse(address)
		must(t, err)
		if got := p.Allow(u); got != want {
			t.Errorf("%q is allowed: %t", address, got)
		}
	}
	var none overlay.Prefixes
	if u, _ := url.Parse("https://store.example/a/b"); none.Allow(u) || !none.Empty() {
		t.Error("no prefix allows something")
	}
	for _, bad := range [][]string{{"https://store.example/a"}, {"https://store.example"}, {"https://u@store.example/"}, {"ftp://store.example/"}, {"https://store.example/?a/"},
		slices.Repeat([]string{"https://store.example/"}, overlay.MaxPrefixes+1), slices.Repeat([]string{"https://store.example/" + strings.Repeat("x", 900) + "/"}, 40)} {
		if _, err := overlay.ParsePrefixes(bad); err == nil {
			t.Errorf("taken: %.60q", bad)
		}
	}
}

func TestStoreAddresses(t *testing.T) {
	for _, good := range []string{"http://x", "https://x.example:8443/a/b?c=d", "http://user:word@[::1]:80/%20"} {
		must(t, overlay.CheckURL(good))
	}
	for _, bad := range []string{
		"", "x", "/etc/passwd", "ftp://x/y", "file:///etc/passwd", "http:", "http://", "http:///x", "https:x", "http://x#y", "http://x/%zz", "http://x/" + strings.Repeat("y", overlay.MaxURL), "HTTP//x", "http://x\n/",
	} {
		if err := overlay.CheckURL(bad); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
	for address, want := range map[string]string{
		"https://user:word@x:8443/a/b?c=d": "https://x:8443/a/b",
		"http://x":                         "http://x",
		"http://word/%zz?c":                "a store whose address is none",
	} {
		if got := overlay.StoreName(address); got != want {
			t.Errorf("%s is called %s", address, got)
		}
	}
}

// FuzzChunks: what is no file of chunks is told, whatever it is; what is one is written
// as it was read.
func FuzzChunks(f *testing.F) {
	m := remoteBase()
	var file bytes.Buffer
	if err := overlay.WriteChunks(&file, chunksOf(m)); err != nil {
		f.Fatal(err)
	}
	whole := file.Bytes()
	f.Add(whole)
	f.Add(append(bytes.Clone(whole), 1))
	f.Add(whole[:64])
	f.Add(whole[:len(whole)-1])
	for _, at := range []int{0, 8, 12, 15, 16, 23, 24, 40, 64} { // each field
		spoilt := bytes.Clone(whole)
		spoilt[at] ^= 0x80
		f.Add(spoilt)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := overlay.ReadChunks(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("%v", err)
			}
			return
		}
		var again bytes.Buffer
		must(t, overlay.WriteChunks(&again, c))
		if !bytes.HasPrefix(b, again.Bytes()) {
			t.Error("it is not written as it was read")
		}
	})
}

package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

// TestStoreClient: it follows within one host, goes through no proxy, keeps to its
// connections, and what it complains of has no secret in it.
func TestStoreClient(t *testing.T) {
	m := remoteBase()
	var connections, elsewhere atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	store := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "/base?"+r.URL.RawQuery, http.StatusPermanentRedirect)
		case "/elsewhere":
			http.Redirect(w, r, other.URL+"/base?"+r.URL.RawQuery, http.StatusFound)
		case "/secure":
			http.Redirect(w, r, "https://"+r.Host+"/base?"+r.URL.RawQuery, http.StatusFound)
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
	const secret = "s3cr3t"
	address := strings.Replace(store.URL, "http://", "http://user:"+secret+"@", 1)
	fetch := func(path string) error {
		client := overlay.StoreClient(nil, nil)
		defer client.CloseIdleConnections()
		p := make([]byte, chunk)
		err := overlay.HTTPFetch(client, address+path+"?key="+secret)(t.Context(), p, chunk)
		if err == nil && !bytes.Equal(p, m[chunk:2*chunk]) {
			t.Errorf("%s: other bytes", path)
		}
		return err
	}
	for _, path := range []string{"/base", "/moved"} {
		must(t, fetch(path))
	}
	for _, path := range []string{"/elsewhere", "/secure"} {
		if err := fetch(path); err == nil || !strings.Contains(err.Error(), "another host is not followed") || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("another host was asked %d times", n)
	}
	client := overlay.StoreClient(nil, nil)
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
		"ended":        overlay.HTTPFetch(client, address+"/base?key="+secret)(ended, make([]byte, 1), 0),
	} {
		if failing == nil || strings.Contains(failing.Error(), secret) {
			t.Errorf("%s: %v", name, failing)
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

package oci_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	. "holdfast/templates/archivetest"

	"holdfast/blockdev/tree"
	"holdfast/templates/archive"
	"holdfast/templates/oci"
	"holdfast/templates/oci/registrytest"
)

func registries(t *testing.T, o oci.RegistryOptions) *oci.Registries {
	t.Helper()
	r, err := oci.NewRegistries(o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// held is how much an image holds: inodes, further names, bytes of files.
type held struct{ inodes, links, bytes int64 }

func heldIn(t tree.Tree) held {
	h := held{inodes: max(0, int64(len(t.Nodes))-1)}
	for _, n := range t.Nodes {
		h.links += int64(len(n.Links))
		h.bytes += n.Size
	}
	return h
}

// pull fetches an image and reads it to its end.
func pull(t *testing.T, r *oci.Registries, reference string, change ...func(*oci.Options)) (held, error) {
	t.Helper()
	o := oci.Options{Staging: t.TempDir(), Platform: "linux/amd64"}
	for _, fn := range change {
		fn(&o)
	}
	im, err := r.Open(t.Context(), reference, o)
	if err != nil {
		return held{}, err
	}
	defer im.Close()
	in := im.Tar(t.Context())
	defer in.Close()
	got, err := oci.Ingest(t.Context(), in)
	if left, rerr := os.ReadDir(o.Staging); rerr != nil || len(left) > 0 {
		t.Errorf("staging: %v, %v", left, rerr)
	}
	return heldIn(got), err
}

func TestRegistry(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	l := NewLayout(Gzipped(Holding("base", strings.Repeat("b", 300_000))), Zstandard(Holding("top", "12")), Plain(Link("link", "base")))
	ref := s.Push("team/app:1.2", l, l.Index.Manifests[0])
	r := registries(t, oci.RegistryOptions{Hosts: []string{"http://" + s.Host}})
	im, err := r.Open(t.Context(), ref, oci.Options{Staging: t.TempDir(), Platform: "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if im.Digest != string(l.Index.Manifests[0].Digest) || im.Config.User != "1000:1000" || im.Layers() != 3 || im.BlobBytes() <= 0 {
		t.Errorf("%+v", im)
	}
	for _, ref := range []string{ref, s.Host + "/team/app@" + im.Digest, ref + "@" + im.Digest} {
		counts, err := pull(t, r, ref)
		if err != nil || counts != (held{2, 1, 300_002}) {
			t.Errorf("%s: %+v, %v", ref, counts, err)
		}
	}
	for ref, want := range map[string]error{
		s.Host + "/team/app:9":                                    oci.ErrNotFound,
		s.Host + "/nobody/nothing":                                oci.ErrNotFound,
		s.Host + "/team/app@sha256:" + strings.Repeat("0", 64):    oci.ErrNotFound,
		"registry.example/app":                                    oci.ErrNotAllowed,
		"127.0.0.1:1/app":                                         oci.ErrNotAllowed,
		"169.254.169.254/latest":                                  oci.ErrNotAllowed,
		"localhost" + s.Host[len("127.0.0.1"):] + "/team/app:1.2": oci.ErrNotAllowed,
		"app":                     oci.ErrInvalid,
		"library/app":             oci.ErrInvalid,
		"http://" + ref:           oci.ErrInvalid,
		"user:password@" + ref:    oci.ErrInvalid,
		s.Host + "/UPPER":         oci.ErrInvalid,
		s.Host + "/a/../b":        oci.ErrInvalid,
		s.Host + "/app:x?y=z":     oci.ErrInvalid,
		s.Host + "/app#x":         oci.ErrInvalid,
		strings.Repeat("x", 2000): oci.ErrInvalid,
		"":                        oci.ErrInvalid,
	} {
		if _, err := pull(t, r, ref); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", ref, err, want)
		}
	}
	if _, err := pull(t, r, ref, func(o *oci.Options) { o.Platform = "linux/amd64/v1/x" }); !errors.Is(err, oci.ErrInvalid) {
		t.Errorf("a bad platform: %v", err)
	}
	// Asked over TLS unless listed otherwise, and this one speaks none.
	if _, err := pull(t, registries(t, oci.RegistryOptions{Hosts: []string{s.Host}}), ref); !errors.Is(err, oci.ErrRegistry) {
		t.Errorf("over TLS: %v", err)
	}
	if _, err := pull(t, registries(t, oci.RegistryOptions{}), ref); !errors.Is(err, oci.ErrNotAllowed) {
		t.Errorf("without a list: %v", err)
	}
}

func TestPlatforms(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	l := NewLayout(Plain(File("amd64")))
	images := l.Index.Manifests
	for _, p := range []ocispec.Platform{{OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "arm", Variant: "v6"}, {OS: "linux", Architecture: "arm", Variant: "v7"}} {
		l.Config.Architecture, l.Config.Variant = p.Architecture, p.Variant
		d := l.Add(Plain(Holding(p.Architecture+p.Variant, strings.Repeat("x", len(images)*100))))
		d.Platform = &p
		images = append(images, d)
	}
	attestation := images[0]
	attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	ref := s.PushIndex("multi:1", l, append([]ocispec.Descriptor{attestation}, images...)...)
	r := registries(t, oci.RegistryOptions{Hosts: []string{"http://" + s.Host}})
	for platform, bytes := range map[string]int64{"linux/amd64": 1, "linux/arm64": 100, "linux/arm64/v8": 100, "linux/arm": 200, "linux/arm/v7": 300} {
		counts, err := pull(t, r, ref, func(o *oci.Options) { o.Platform = platform })
		if err != nil || counts.bytes != bytes {
			t.Errorf("%s: %+v, %v", platform, counts, err)
		}
	}
	for _, platform := range []string{"linux/s390x", "windows/amd64", "linux/arm/v5"} {
		_, err := pull(t, r, ref, func(o *oci.Options) { o.Platform = platform })
		if !errors.Is(err, archive.ErrRefused) || !strings.Contains(err.Error(), "linux/arm64/v8") {
			t.Errorf("%s: %v", platform, err)
		}
	}
	single := s.Push("single:1", l, images[1])
	if _, err := pull(t, r, single); !errors.Is(err, archive.ErrRefused) || !strings.Contains(err.Error(), "not for linux/amd64") {
		t.Errorf("an image of another platform: %v", err)
	}
}

// What a registry's disk or a bad registry does to blobs is noticed.
func TestDamagedBlobs(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	r := registries(t, oci.RegistryOptions{Hosts: []string{"http://" + s.Host}})
	damage := map[string]func(b []byte) []byte{
		"wrong":     func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"truncated": func(b []byte) []byte { return b[:len(b)-10] },
		"longer":    func(b []byte) []byte { return append(b, "more"...) },
		"empty":     func([]byte) []byte { return nil },
	}
	for name, fn := range damage {
		for _, which := range []string{"manifest", "config", "layer"} {
			t.Run(name+" "+which, func(t *testing.T) {
				layer := Gzipped(Holding("f", strings.Repeat(name+which, 1000)))
				l := NewLayout(layer)
				l.Config.Author = name + which // so that no two have blobs in common
				d := l.Add(layer)
				ref := s.Push(fmt.Sprintf("damaged/%s:%s", name, which), l, d)
				digest := map[string]ocispec.Descriptor{"manifest": d, "config": l.Manifest.Config, "layer": l.Manifest.Layers[0]}[which].Digest
				file := s.Blob(digest)
				b, err := os.ReadFile(file)
				if err == nil {
					err = os.WriteFile(file, fn(b), 0o644)
				}
				if err != nil {
					t.Fatal(err)
				}
				if _, err := pull(t, r, ref); !errors.Is(err, archive.ErrRefused) && !errors.Is(err, oci.ErrRegistry) && !errors.Is(err, oci.ErrNotFound) {
					t.Errorf("%v", err)
				} else {
					t.Log(err)
				}
			})
		}
	}
}

// A registry may send us on for a blob, and goes no further than the list.
func TestRedirects(t *testing.T) {
	var asked atomic.Int32
	blobs := map[string][]byte{}
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials went to another host")
		}
		for digest, b := range blobs {
			if strings.Contains(r.URL.Path, digest) {
				_, _ = w.Write(b)
				return
			}
		}
		http.NotFound(w, r)
	}))
	defer elsewhere.Close()
	s := registrytest.Start(t, registrytest.Options{Redirect: elsewhere.URL, Password: true})
	l := NewLayout(Gzipped(Holding("f", "12345")))
	ref := s.Push("app:1", l, l.Index.Manifests[0])
	for name, b := range l.Files {
		blobs[filepath.Base(name)] = b
	}
	asked.Store(0)
	auth := dockerConfig(t, s.Host, registrytest.User, registrytest.Password)
	other := strings.TrimPrefix(elsewhere.URL, "http://")
	for _, others := range [][]string{nil, {other}, {"registry.example"}} { // listed for TLS only
		_, err := pull(t, registries(t, oci.RegistryOptions{Hosts: []string{"http://" + s.Host}, Others: others, Credentials: auth}), ref)
		if !errors.Is(err, oci.ErrRegistry) || !strings.Contains(err.Error(), other) {
			t.Errorf("%v: %v", others, err)
		}
		if err != nil && strings.Contains(err.Error(), "sha256/") {
			t.Errorf("the address is in the message: %v", err)
		}
	}
	if asked.Load() != 0 {
		t.Errorf("a host that is not listed was asked %d times", asked.Load())
	}
	counts, err := pull(t, registries(t, oci.RegistryOptions{Hosts: []string{"http://" + s.Host}, Others: []string{"http://" + other}, Credentials: auth}), ref)
	if err != nil || counts.bytes != 5 || asked.Load() == 0 {
		t.Errorf("with the host listed: %+v, %v, asked %d times", counts, err, asked.Load())
	}
}

func dockerConfig(t *testing.T, host, user, password string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.json")
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	if err := os.WriteFile(file, []byte(fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, auth)), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestCredentials(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{Password: true})
	l := NewLayout(Gzipped(File("f")))
	ref := s.Push("private/app:1", l, l.Index.Manifests[0])
	for name, c := range map[string]struct {
		file string
		want error
	}{
		"right":   {dockerConfig(t, s.Host, registrytest.User, registrytest.Password), nil},
		"wrong":   {dockerConfig(t, s.Host, registrytest.User, "guessed-wrongly"), oci.ErrNotFound},
		"another": {dockerConfig(t, "registry.example", registrytest.User, registrytest.Password), oci.ErrNotFound},
		"none":    {"", oci.ErrNotFound},
	} {
		_, err := pull(t, registries(t, oci.RegistryOptions{Hosts: []string{"http://" + s.Host}, Credentials: c.file}), ref)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && (strings.Contains(err.Error(), "guessed") || strings.Contains(err.Error(), registrytest.Password)) {
			t.Errorf("%s: a password is in %v", name, err)
		}
	}
	for name, o := range map[string]oci.RegistryOptions{
		"no such file": {Credentials: "/nonexistent/config.json"},
		"a path":       {Hosts: []string{"registry.example/x"}},
		"https":        {Hosts: []string{"https://registry.example"}},
		"empty":        {Hosts: []string{""}},
		"user":         {Others: []string{"a@registry.example"}},
	} {
		if _, err := oci.NewRegistries(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A token is asked for where the registry says, if that is listed.
func TestTokenRealm(t *testing.T) {
	var asked atomic.Int32
	realm := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer realm.Close()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm.URL+`/token?a=b",service="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "http://")
	_, err := pull(t, registries(t, oci.RegistryOptions{Hosts: []string{"http://" + host}}), host+"/app")
	if !errors.Is(err, oci.ErrRegistry) || asked.Load() != 0 {
		t.Errorf("%v, asked %d times", err, asked.Load())
	}
}

// A registry that does not go on is given up; so is one that drips, by the context.
func TestSlowRegistry(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	l := NewLayout(Gzipped(File("f")))
	ref := s.Push("app:1", l, l.Index.Manifests[0])
	r := registries(t, oci.RegistryOptions{Hosts: []string{"http://" + s.Host}, Stall: 300 * time.Millisecond})
	goOn := s.Pause()
	if _, err := pull(t, r, ref); !errors.Is(err, oci.ErrRegistry) {
		t.Errorf("a registry that stands still: %v", err)
	}
	goOn()
	patient := registries(t, oci.RegistryOptions{Hosts: []string{"http://" + s.Host}})
	if _, err := pull(t, patient, ref); err != nil {
		t.Errorf("when it goes on: %v", err)
	}

	var stall atomic.Bool
	stop := make(chan struct{})
	drip := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b := l.Files["blobs/sha256/"+strings.TrimPrefix(filepath.Base(req.URL.Path), "sha256:")]
		if strings.HasSuffix(req.URL.Path, "/manifests/1") {
			b = l.Files["blobs/sha256/"+l.Index.Manifests[0].Digest.Encoded()]
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", string(l.Index.Manifests[0].Digest))
		} else if strings.Contains(req.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		if req.Method == http.MethodHead {
			return
		}
		for i := range b {
			if _, err := w.Write(b[i : i+1]); err != nil {
				return
			}
			_ = http.NewResponseController(w).Flush()
			if i == 3 && stall.Load() {
				<-stop
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}))
	defer drip.Close()
	defer close(stop)
	host := strings.TrimPrefix(drip.URL, "http://")
	r = registries(t, oci.RegistryOptions{Hosts: []string{"http://" + host}, Stall: 3 * time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.Open(ctx, host+"/app:1", oci.Options{Staging: t.TempDir(), Platform: "linux/amd64"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dripping: %v", err)
	}
	stall.Store(true)
	if _, err := r.Open(t.Context(), host+"/app:1", oci.Options{Staging: t.TempDir(), Platform: "linux/amd64"}); !errors.Is(err, oci.ErrRegistry) || !strings.Contains(err.Error(), "nothing for too long") {
		t.Errorf("stalled: %v", err)
	}
}

package auth

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/metadata"
)

// place is a state directory with its clock and its log.
type place struct {
	dir   string
	log   bytes.Buffer
	mu    sync.Mutex
	clock time.Time
	fail  error  // of the next commits
	at    string // the failpoint where; empty: the first
}

func newPlace(t *testing.T) *place {
	return &place{dir: t.TempDir(), clock: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
}

func (p *place) now() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clock = p.clock.Add(time.Millisecond)
	return p.clock
}

func (p *place) pass(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clock = p.clock.Add(d)
}

// open opens everything; what close gives closes it again.
func (p *place) open(t *testing.T) (a *Auth, closeAll func()) {
	t.Helper()
	log := slog.New(slog.NewJSONHandler(&p.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	store, err := metadata.Open(filepath.Join(p.dir, "store"), metadata.Options{
		Log: slog.New(slog.DiscardHandler), Failpoint: func(point string) error {
			if p.at != "" && p.at != point {
				return nil
			}
			return p.fail
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	side, err := metadata.OpenSideLog(filepath.Join(p.dir, "side.log"))
	if err != nil {
		t.Fatal(err)
	}
	closeAll = sync.OnceFunc(func() {
		if err := errors.Join(store.Close(), side.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(closeAll)
	a, err = Open(t.Context(), Options{Store: store, SideLog: side, Secret: bytes.Repeat([]byte("s"), 32), Log: log, Now: p.now})
	if err != nil {
		t.Fatal(err)
	}
	return a, closeAll
}

func ask(t *testing.T, a *Auth, headers ...string) (api.Principal, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	p, err := a.Authenticate(r)
	if err != nil && (!errors.Is(err, api.ErrUnauthorized) || p != (api.Principal{})) {
		t.Fatalf("%v: %v, %v", headers, p, err)
	}
	return p, err
}

func workspace(t *testing.T, a *Auth, name string) api.Workspace {
	t.Helper()
	w, err := a.PutWorkspace(t.Context(), name, nil, "test")
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func create(t *testing.T, a *Auth, n api.NewKey) (api.Key, string) {
	t.Helper()
	k, text, err := a.CreateKey(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return k, text
}

// listing is everything that Auth keeps, as bytes to compare.
func listing(t *testing.T, a *Auth) string {
	t.Helper()
	keys, err1 := a.Keys("")
	workspaces, err2 := a.Workspaces()
	b, err3 := json.MarshalIndent([]any{keys, workspaces}, "", " ")
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestKeysOpenTheDoor(t *testing.T) {
	a, _ := newPlace(t).open(t)
	workspace(t, a, "main")
	k, text := create(t, a, api.NewKey{Name: "ann", Workspace: "main", Role: api.Writer, Actor: "root"})
	want := api.Principal{KeyID: k.ID, Name: "ann", Role: api.Writer, Workspace: "main"}
	for _, h := range [][]string{
		{"Authorization: Bearer " + text},
		{"X-Blaxel-Authorization: Bearer " + text},
		{"authorization: bearer  " + text + " "},
		{"X-Blaxel-Authorization: Bearer " + text, "Authorization: Basic cHJveHk6cHJveHk="},
	} {
		if p, err := ask(t, a, h...); err != nil || p != want {
			t.Errorf("%v: %+v, %v", h, p, err)
		}
	}
	other, otherText := create(t, a, api.NewKey{Workspace: "main", Role: api.Reader})
	for _, h := range [][]string{
		{},
		{"Authorization: "},
		{"Authorization: " + text},
		{"Authorization: Bearer "},
		{"Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(k.ID+":"+text))},
		{"Authorization: Bearer " + text[:len(text)-1]},
		{"Authorization: Bearer " + strings.ToUpper(text)},
		{"Authorization: Bearer " + strings.Replace(text, k.ID, other.ID, 1)},
		{"Authorization: Bearer " + k.ID},
		{"Authorization: Bearer " + text, "Authorization: Bearer " + text},
		{"X-Blaxel-Authorization: Bearer wrong", "Authorization: Bearer " + text},
	} {
		if p, err := ask(t, a, h...); err == nil {
			t.Errorf("%v: let in as %+v", h, p)
		}
	}
	if a.LastUsed(k.ID).IsZero() || !a.LastUsed(other.ID).IsZero() {
		t.Error("last use", a.LastUsed(k.ID), a.LastUsed(other.ID))
	}
	if _, err := a.Identify(otherText); err != nil {
		t.Error(err)
	}
}

// Another key's secret under this id, with a right checksum, is not enough.
func TestSecretMustBeTheKeysOwn(t *testing.T) {
	a, _ := newPlace(t).open(t)
	k, _ := create(t, a, api.NewKey{ControlPlane: true, Role: api.Admin})
	_, foreign := newText()
	body := textPrefix + k.ID + foreign[len(textPrefix)+idLength:len(foreign)-sumLength]
	forged := body + checksum(body)
	if id, ok := parseText(forged); !ok || id != k.ID {
		t.Fatal("the forged text is not well-formed")
	}
	if _, err := a.Identify(forged); !errors.Is(err, api.ErrUnauthorized) {
		t.Fatal(err)
	}
}

func TestEveryTypingErrorIsSeen(t *testing.T) {
	_, text := newText()
	if _, ok := parseText(text); !ok {
		t.Fatal(text)
	}
	for i := range text {
		for _, c := range "0v_x" {
			if typo := text[:i] + string(c) + text[i+1:]; typo != text {
				if _, ok := parseText(typo); ok {
					t.Errorf("%s passes", typo)
				}
			}
		}
	}
}

func TestRevocation(t *testing.T) {
	p := newPlace(t)
	a, closeAll := p.open(t)
	workspace(t, a, "main")
	workspace(t, a, "other")
	k, text := create(t, a, api.NewKey{Workspace: "main", Role: api.Admin})
	token, _, err := a.IssueToken(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, ws := range []string{"other", "nowhere"} {
		if _, err := a.RevokeKey(t.Context(), ws, k.ID, "eve"); !errors.Is(err, api.ErrMissing) {
			t.Fatalf("from %s: %v", ws, err)
		}
	}
	if _, err := a.RevokeKey(t.Context(), "main", "nokey", "ann"); !errors.Is(err, api.ErrMissing) {
		t.Fatal(err)
	}
	if _, err := a.Identify(token); err != nil {
		t.Fatal(err)
	}
	first, err := a.RevokeKey(t.Context(), "main", k.ID, "ann")
	if err != nil || first.RevokedAt.IsZero() {
		t.Fatal(first, err)
	}
	again, err := a.RevokeKey(t.Context(), "main", k.ID, "bob")
	if err != nil || again != first {
		t.Fatalf("%+v, %v", again, err)
	}
	for range 2 { // also after a restart
		for _, credentials := range []string{text, token} {
			if _, err := a.Identify(credentials); !errors.Is(err, api.ErrUnauthorized) {
				t.Fatalf("still good: %v", err)
			}
		}
		closeAll()
		a, closeAll = p.open(t)
	}
}

// A key is out at once even when its revocation cannot be made durable.
func TestRevocationThatCannotBeWritten(t *testing.T) {
	p := newPlace(t)
	a, _ := p.open(t)
	k, text := create(t, a, api.NewKey{ControlPlane: true, Role: api.Admin})
	p.fail = errors.New("crash")
	if _, err := a.RevokeKey(t.Context(), "", k.ID, "ann"); !errors.Is(err, p.fail) {
		t.Fatal(err)
	}
	if _, err := a.Identify(text); !errors.Is(err, api.ErrUnauthorized) {
		t.Fatal(err)
	}
}

func TestExpiry(t *testing.T) {
	p := newPlace(t)
	a, _ := p.open(t)
	_, text := create(t, a, api.NewKey{ControlPlane: true, Role: api.Admin, ExpiresAt: p.now().Add(10 * time.Minute)})
	token, life, err := a.IssueToken(text)
	if err != nil || life > 10*time.Minute || life < 9*time.Minute {
		t.Fatalf("a token for %v, %v", life, err)
	}
	p.pass(9 * time.Minute)
	if _, err := a.Identify(text); err != nil {
		t.Fatal(err)
	}
	p.pass(time.Minute)
	for _, credentials := range []string{text, token} {
		if _, err := a.Identify(credentials); !errors.Is(err, api.ErrUnauthorized) {
			t.Fatal(err)
		}
	}
	if _, _, err := a.IssueToken(text); !errors.Is(err, api.ErrUnauthorized) {
		t.Fatal(err)
	}
}

func TestTokens(t *testing.T) {
	p := newPlace(t)
	a, _ := p.open(t)
	k, text := create(t, a, api.NewKey{Name: "ci", ControlPlane: true, Role: api.Writer})
	token, life, err := a.IssueToken(text)
	if err != nil || life != time.Hour {
		t.Fatal(life, err)
	}
	got, err := ask(t, a, "X-Blaxel-Authorization: Bearer "+token)
	if err != nil || got != (api.Principal{KeyID: k.ID, Name: "ci", Role: api.Writer, ControlPlane: true}) {
		t.Fatalf("%+v, %v", got, err)
	}
	if strings.Contains(token, text[len(textPrefix)+idLength+1:]) {
		t.Fatal("the token holds the secret")
	}
	var c claims // clients read these two without the key
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil || json.Unmarshal(raw, &c) != nil || c.Expires-c.Issued != 3600 {
		t.Fatalf("%s, %v", raw, err)
	}
	parts := strings.Split(token, ".")
	none := segment([]byte(`{"alg":"none","typ":"JWT"}`))
	later, _ := json.Marshal(claims{issuer, k.ID, c.Issued, c.Expires + 1})
	altered := "A" + parts[2][1:]
	if altered == parts[2] {
		altered = "B" + parts[2][1:]
	}
	otherSigner, _ := newSigner(bytes.Repeat([]byte("o"), 32))
	for name, forged := range map[string]string{
		"longer life":       parts[0] + "." + segment(later) + "." + parts[2],
		"no algorithm":      none + "." + parts[1] + ".",
		"no signature":      parts[0] + "." + parts[1] + ".",
		"another header":    none + "." + parts[1] + "." + segment(mac(a.signer.key, none+"."+parts[1])),
		"another secret":    otherSigner.token(k.ID, p.now(), time.Hour),
		"the underived key": signer{a.o.Secret}.token(k.ID, p.now(), time.Hour),
		"no such key":       a.signer.token("0123456789abc", p.now(), time.Hour),
		"from the future":   a.signer.token(k.ID, p.now().Add(time.Hour), time.Hour),
		"over":              a.signer.token(k.ID, p.now().Add(-time.Hour), time.Hour),
		"not a token":       "a.b.c",
		"padded signature":  token + "=",
		"signature altered": parts[0] + "." + parts[1] + "." + altered,
	} {
		if _, err := a.Identify(forged); !errors.Is(err, api.ErrUnauthorized) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := a.IssueToken(token); !errors.Is(err, api.ErrUnauthorized) {
		t.Errorf("a token for a token: %v", err)
	}
	p.pass(time.Hour)
	if _, err := a.Identify(token); !errors.Is(err, api.ErrUnauthorized) {
		t.Error(err)
	}
}

func TestNewKeysAreChecked(t *testing.T) {
	p := newPlace(t)
	a, _ := p.open(t)
	workspace(t, a, "main")
	for _, c := range []struct {
		n    api.NewKey
		want error
	}{
		{api.NewKey{Workspace: "main", Role: "owner"}, api.ErrBadRequest},
		{api.NewKey{Workspace: "main"}, api.ErrBadRequest},
		{api.NewKey{Role: api.Admin}, api.ErrBadRequest},
		{api.NewKey{Workspace: "main", Role: api.Reader, ExpiresAt: p.now().Add(-time.Second)}, api.ErrBadRequest},
		{api.NewKey{Workspace: "main", Role: api.Reader, Name: strings.Repeat("x", 257)}, api.ErrBadRequest},
		{api.NewKey{Workspace: "main", Role: api.Reader, Name: "\xff"}, api.ErrBadRequest},
		{api.NewKey{Workspace: "nowhere", Role: api.Reader}, api.ErrMissing},
	} {
		if _, text, err := a.CreateKey(t.Context(), c.n); !errors.Is(err, c.want) || text != "" {
			t.Errorf("%+v: %v, want %v", c.n, err, c.want)
		}
	}
	for _, name := range []string{"", "-a", "a-", "A", "a_b", "../x", strings.Repeat("a", 50), "ä"} {
		if _, err := a.PutWorkspace(t.Context(), name, nil, ""); !errors.Is(err, api.ErrBadRequest) {
			t.Errorf("workspace %q: %v", name, err)
		}
	}
}

func TestListings(t *testing.T) {
	a, _ := newPlace(t).open(t)
	workspace(t, a, "main")
	workspace(t, a, "other")
	m1, _ := create(t, a, api.NewKey{Workspace: "main", Role: api.Reader})
	o1, _ := create(t, a, api.NewKey{Workspace: "other", Role: api.Reader})
	c1, _ := create(t, a, api.NewKey{Workspace: "main", ControlPlane: true, Role: api.Admin})
	m2, _ := create(t, a, api.NewKey{Workspace: "main", Role: api.Writer})
	for ws, want := range map[string][]api.Key{"main": {m1, m2}, "other": {o1}, "": {m1, o1, c1, m2}, "nowhere": {}} {
		if got, err := a.Keys(ws); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v, %v, want %v", ws, got, err, want)
		}
	}
	if _, err := a.RevokeKey(t.Context(), "main", c1.ID, "ann"); !errors.Is(err, api.ErrMissing) {
		t.Errorf("a workspace revokes a control-plane key: %v", err)
	}
}

func TestWorkspaces(t *testing.T) {
	p := newPlace(t)
	a, closeAll := p.open(t)
	first := workspace(t, a, "main")
	if again := workspace(t, a, "main"); again != first {
		t.Fatalf("%+v, then %+v", first, again)
	}
	title := "The main one"
	named, err := a.PutWorkspace(t.Context(), "main", &title, "ann")
	if err != nil || named.DisplayName != title || named.ID != first.ID || !named.UpdatedAt.After(first.UpdatedAt) {
		t.Fatalf("%+v, %v", named, err)
	}
	_, text := create(t, a, api.NewKey{Workspace: "main", Role: api.Admin})
	if err := a.DeleteWorkspace(t.Context(), "main", "ann"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := a.Workspace("main"); !errors.Is(err, api.ErrMissing) {
			t.Fatal(err)
		}
		if _, err := a.Identify(text); !errors.Is(err, api.ErrUnauthorized) {
			t.Fatalf("the key of a deleted workspace: %v", err)
		}
		if err := a.DeleteWorkspace(t.Context(), "main", "ann"); !errors.Is(err, api.ErrMissing) {
			t.Fatal(err)
		}
		closeAll()
		a, closeAll = p.open(t)
	}
	if anew := workspace(t, a, "main"); anew.ID == first.ID || anew.DisplayName != "" {
		t.Fatalf("the new workspace is the old one: %+v", anew)
	}
	if _, err := a.Identify(text); !errors.Is(err, api.ErrUnauthorized) {
		t.Fatalf("an old key opens the new workspace: %v", err)
	}
}

func TestOldKeysAreForgotten(t *testing.T) {
	p := newPlace(t)
	a, closeAll := p.open(t)
	k, _ := create(t, a, api.NewKey{ControlPlane: true, Role: api.Reader})
	create(t, a, api.NewKey{ControlPlane: true, Role: api.Reader, ExpiresAt: p.now().Add(time.Hour)})
	kept, _ := create(t, a, api.NewKey{ControlPlane: true, Role: api.Reader})
	if _, err := a.RevokeKey(t.Context(), "", k.ID, ""); err != nil {
		t.Fatal(err)
	}
	p.pass(keepOver - time.Minute)
	last, _ := create(t, a, api.NewKey{ControlPlane: true, Role: api.Reader})
	if keys, _ := a.Keys(""); len(keys) != 4 {
		t.Fatal(keys)
	}
	p.pass(2 * time.Hour)
	newest, _ := create(t, a, api.NewKey{ControlPlane: true, Role: api.Reader})
	for range 2 {
		if keys, _ := a.Keys(""); !reflect.DeepEqual(keys, []api.Key{kept, last, newest}) {
			t.Fatal(keys)
		}
		closeAll()
		a, closeAll = p.open(t)
	}
}

// No secret, and no hash of one, gets into the log or into what fmt prints.
func TestSecretsStayOutOfLogs(t *testing.T) {
	p := newPlace(t)
	a, _ := p.open(t)
	good, bad := fill(t, a, p)
	token, _, err := a.IssueToken(good)
	if err != nil {
		t.Fatal(err)
	}
	id, _ := parseText(good)
	k := a.held(id)
	principal, err := a.Identify(good)
	if err != nil {
		t.Fatal(err)
	}
	_, wrong := a.Identify(good[:len(good)-1] + "_")
	a.log.Info("all", "principal", principal, "held", k, "record", k.keyRecord, "key", k.key(), "error", wrong)
	shown := p.log.String() + fmt.Sprintf("%v %+v %#v %v %+v %#v %v", k, k, k, k.keyRecord, k.keyRecord, k.keyRecord, wrong)
	for what, secret := range map[string]string{
		"secret": good[len(textPrefix)+idLength+1:][:20], "revoked secret": bad[len(textPrefix)+idLength+1:][:20],
		"hash": k.Hash[:20], "token": token[len(token)-20:], "raw hash": fmt.Sprint(k.hash[:5])[1:], //nolint:staticcheck // as numbers: what a careless log would show
	} {
		if strings.Contains(shown, secret) {
			t.Errorf("the %s shows in\n%s", what, shown)
		}
	}
	if !strings.Contains(shown, id) {
		t.Error("the log does not say which key")
	}
}

// What is on disk opens no door either.
func TestStoredBytesHoldNoSecret(t *testing.T) {
	p := newPlace(t)
	a, closeAll := p.open(t)
	good, bad := fill(t, a, p)
	closeAll()
	read := 0
	err := filepath.WalkDir(p.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		read += len(b)
		for _, text := range []string{good, bad} {
			if bytes.Contains(b, []byte(text[len(textPrefix)+idLength+1:][:20])) {
				t.Errorf("%s holds a secret", path)
			}
		}
		return err
	})
	if err != nil || read < 1000 {
		t.Fatal(read, err)
	}
}

func TestConcurrentUse(t *testing.T) {
	a, _ := newPlace(t).open(t)
	workspace(t, a, "main")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5 {
				k, text, err := a.CreateKey(t.Context(), api.NewKey{Workspace: "main", Role: api.Reader})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := a.Identify(text); err != nil {
					t.Error(err)
				}
				if _, err := a.RevokeKey(t.Context(), "main", k.ID, ""); err != nil {
					t.Error(err)
				}
				if _, err := a.Identify(text); err == nil {
					t.Error("revoked, but good")
				}
			}
		})
	}
	wg.Wait()
	if keys, _ := a.Keys("main"); len(keys) != 40 {
		t.Fatalf("%d keys", len(keys))
	}
}

func FuzzIdentify(f *testing.F) {
	_, text := newText()
	s, _ := newSigner(bytes.Repeat([]byte("s"), 32))
	f.Add(text)
	f.Add(s.token("0123456789abc", time.Unix(1e9, 0), time.Hour))
	f.Add("hf_")
	f.Fuzz(func(t *testing.T, credentials string) {
		if id, ok := parseText(credentials); ok && (len(id) != idLength || !strings.HasPrefix(credentials, textPrefix+id+"_")) {
			t.Fatalf("%q has id %q", credentials, id)
		}
		if id, err := s.verify(credentials, time.Unix(1e9+1, 0)); err == nil && credentials != s.token(id, time.Unix(1e9, 0), time.Hour) {
			t.Fatalf("%q is accepted for %q", credentials, id)
		}
	})
}

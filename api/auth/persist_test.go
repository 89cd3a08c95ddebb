package auth

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api"
)

// fill makes something of everything.
func fill(t *testing.T, a *Auth, p *place) (good, bad string) {
	t.Helper()
	title := "Displayed"
	for _, name := range []string{"main", "gone", "other"} {
		if _, err := a.PutWorkspace(t.Context(), name, &title, "root"); err != nil {
			t.Fatal(err)
		}
	}
	_, good = create(t, a, api.NewKey{Name: "good", Workspace: "main", Role: api.Writer, Actor: "root", ExpiresAt: p.now().Add(time.Hour)})
	k, bad := create(t, a, api.NewKey{Name: "bad", Workspace: "main", Role: api.Admin, Actor: "root"})
	create(t, a, api.NewKey{Workspace: "gone", Role: api.Admin})
	create(t, a, api.NewKey{ControlPlane: true, Role: api.Admin})
	if _, err := a.RevokeKey(t.Context(), "", k.ID, "root"); err != nil {
		t.Fatal(err)
	}
	if err := a.DeleteWorkspace(t.Context(), "gone", "root"); err != nil {
		t.Fatal(err)
	}
	return good, bad
}

// Either place alone has everything, and gives it to the other.
func TestEitherPlaceRestoresTheOther(t *testing.T) {
	for _, lost := range []string{"store", "side.log"} {
		t.Run(lost, func(t *testing.T) {
			p := newPlace(t)
			a, closeAll := p.open(t)
			good, bad := fill(t, a, p)
			want := listing(t, a)
			closeAll()
			for _, lost := range []string{lost, "", map[string]string{"store": "side.log", "side.log": "store"}[lost]} {
				if lost != "" {
					if err := os.RemoveAll(filepath.Join(p.dir, lost)); err != nil {
						t.Fatal(err)
					}
				}
				a, closeAll = p.open(t)
				if got := listing(t, a); got != want {
					t.Fatalf("after losing %q:\n%s\nwant\n%s", lost, got, want)
				}
				if _, err := a.Identify(good); err != nil {
					t.Fatal(err)
				}
				if _, err := a.Identify(bad); !errors.Is(err, api.ErrUnauthorized) {
					t.Fatal(err)
				}
				closeAll()
			}
		})
	}
}

// Without both nobody gets in.
func TestFailsClosed(t *testing.T) {
	p := newPlace(t)
	a, closeAll := p.open(t)
	good, _ := fill(t, a, p)
	token, _, err := a.IssueToken(good)
	if err != nil {
		t.Fatal(err)
	}
	closeAll()
	for _, lost := range []string{"store", "side.log"} {
		if err := os.RemoveAll(filepath.Join(p.dir, lost)); err != nil {
			t.Fatal(err)
		}
	}
	a, _ = p.open(t)
	for _, credentials := range []string{good, token} {
		if _, err := a.Identify(credentials); !errors.Is(err, api.ErrUnauthorized) {
			t.Fatal(err)
		}
	}
	if !strings.Contains(p.log.String(), "only the local socket has access") {
		t.Fatal("nobody is told")
	}
}

// A crash between the side log and the database: what the log has counts; what
// was not acknowledged opens no door.
func TestCrashBetweenTheTwo(t *testing.T) {
	for _, point := range []string{"metadata.commit.before", "metadata.commit.after"} {
		t.Run(point, func(t *testing.T) {
			p := newPlace(t)
			a, closeAll := p.open(t)
			workspace(t, a, "main")
			k, text := create(t, a, api.NewKey{Workspace: "main", Role: api.Admin})
			p.fail, p.at = errors.New("crash"), point
			if _, err := a.RevokeKey(t.Context(), "main", k.ID, "ann"); !errors.Is(err, p.fail) {
				t.Fatal(err)
			}
			if _, text, err := a.CreateKey(t.Context(), api.NewKey{Workspace: "main", Role: api.Admin}); !errors.Is(err, p.fail) || text != "" {
				t.Fatal(text, err)
			}
			if _, err := a.PutWorkspace(t.Context(), "second", nil, "ann"); !errors.Is(err, p.fail) {
				t.Fatal(err)
			}
			p.fail = nil
			closeAll()
			a, closeAll = p.open(t)
			if _, err := a.Identify(text); !errors.Is(err, api.ErrUnauthorized) {
				t.Fatalf("the revocation is lost: %v", err)
			}
			first := listing(t, a)
			keys, _ := a.Keys("")
			_, err := a.Workspace("second")
			if point == "metadata.commit.before" && (len(keys) != 1 || !errors.Is(err, api.ErrMissing)) {
				t.Fatalf("what was taken back is there: %v, %v", keys, err)
			}
			closeAll()
			a, _ = p.open(t)
			if again := listing(t, a); again != first {
				t.Fatalf("%s\nthen\n%s", first, again)
			}
		})
	}
}

package api

import "testing"

// TestClientsOfExports: a list with what is no name is never taken for "anybody", or for
// other names.
func TestClientsOfExports(t *testing.T) {
	for _, names := range [][]string{{""}, {"a", ""}, {"a b"}, {" "}} {
		if got := clientsText(names); got != " " {
			t.Errorf("%q become %q", names, got)
		}
	}
	to := Target{Type: "export", Clients: []string{"a", "b"}}
	if got := targetBody(to.target()).Clients; len(got) != 2 || got[0] != "a" || got[1] != "b" {
		t.Errorf("there and back: %q", got)
	}
	if got := clientsText(nil); got != "" {
		t.Errorf("nobody named is %q", got)
	}
}

package export_test

import (
	"net/netip"
	"strings"
	"testing"

	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/export"
)

// TestPortsAreKept: the port of an export whose worker is away for a moment is not given
// to another one, also by a daemon that has just begun and sees it for the first time.
func TestPortsAreKept(t *testing.T) {
	b := newBench(t)
	const port = 24917
	begin := func() *export.Attacher {
		t.Helper()
		a, err := export.New(export.Options{Door: b.door, Pool: b.w, Network: export.Network{
			Address: netip.MustParseAddr("127.0.0.1"), First: port, Last: port, Certificate: "c", Key: "k", Authorities: "a",
		}})
		good(t, err)
		return a
	}
	asked := attach.Target{Type: export.Type, Protocol: "nbd", Transport: export.TLS}
	target, err := begin().Resolve(t.Context(), asked, "")
	good(t, err)
	if target.Port != port || target.Export == "" {
		t.Fatalf("%+v", target)
	}
	a := begin()
	if state, err := a.Probe(t.Context(), attach.Request{Volume: id, Target: target}); err != nil || state != attach.StateMissing {
		t.Fatalf("%s, %v", state, err)
	}
	if other, err := a.Resolve(t.Context(), asked, ""); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("its port was given to %+v, %v", other, err)
	}
}

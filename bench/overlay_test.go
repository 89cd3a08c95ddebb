package bench

import (
	"math/rand/v2"
	"runtime/debug"
	"testing"
)

// TestOverlayIsUnmounted: what a bench of layers leaves open goes before its file system,
// though no collection has come by.
func TestOverlayIsUnmounted(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	o := Overlay{Setting: Setting{Dir: t.TempDir(), Rounds: 1, Quick: true, Log: t.Output()}, order: rand.New(rand.NewPCG(1, 2))} //nolint:gosec // where requests go
	if err := o.mount(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := o.stalls(t.Context()); err != nil {
		t.Error(err)
	}
	if err := o.unmount(t.Context()); err != nil {
		t.Error(err)
	}
}

package main_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/api/client"
)

// TestFreezeEnds: at its deadline, with the daemon's orderly end, and after its
// death with the next start. A writer that was held goes on each time.
func TestFreezeEnds(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	dir := filepath.Join(n.state, "attach", "job")
	_, err := n.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: "data"}, Spec: client.VolumeSpec{Size: 64}}, "")
	must(t, err)
	_, err = n.Attach(ctx, "data", client.Attachment{Holder: "sandbox:job", Target: client.Target{Type: "host", Path: dir}})
	must(t, err)
	for name, end := range map[string]struct {
		timeout time.Duration
		by      func()
	}{
		"deadline": {300 * time.Millisecond, func() {}},
		"stop":     {time.Minute, func() { n.stop(); n.start() }},
		"kill":     {time.Minute, func() { n.kill(); n.start() }},
	} {
		f, err := n.Freeze(ctx, "data", end.timeout)
		must(t, err)
		if !f.Frozen {
			t.Errorf("%s: %+v", name, f)
		}
		began, wrote := time.Now(), make(chan error, 1)
		go func() { wrote <- os.WriteFile(filepath.Join(dir, name), []byte("held"), 0o644) }()
		select {
		case err := <-wrote:
			must(t, err)
			if time.Since(began) < end.timeout/2 {
				t.Errorf("%s: a write to a frozen volume was not held", name)
			}
			wrote <- nil
		case <-time.After(50 * time.Millisecond): // not to wait for something: a moment in which nothing may happen
		}
		end.by()
		select {
		case err := <-wrote:
			must(t, err)
		case <-time.After(patience):
			t.Fatalf("%s: the writer is still held", name)
		}
		v, err := n.Volume(ctx, "data")
		must(t, err)
		for deadline := time.Now().Add(patience); !v.State.FrozenUntil.IsZero() && time.Now().Before(deadline); {
			v, err = n.Volume(ctx, "data")
			must(t, err)
		}
		if !v.State.FrozenUntil.IsZero() || v.Events[len(v.Events)-1].Type != "thaw" {
			t.Errorf("%s: %+v", name, v)
		}
	}
}

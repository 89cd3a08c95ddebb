package main_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/limit"
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

// TestLimitsFollowTheAttachment: the kernel's rules are there from the attach to
// the detach, over the daemon's death and a change, and not a moment longer.
func TestLimitsFollowTheAttachment(t *testing.T) {
	limiter, err := limit.New()
	must(t, err)
	const rules = "/sys/fs/cgroup/blkio/blkio.throttle."
	if e, err := limiter.Explain(attach.Target{Type: "host"}, false); err != nil || !strings.Contains(e.Mechanism, "v1") {
		t.Skip("this host limits no host attachments by cgroup v1:", e, err)
	}
	n, ctx := newNode(t), context.Background()
	dir := filepath.Join(n.state, "attach", "job")
	_, err = n.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: "data"}, Spec: client.VolumeSpec{Size: 64}}, "")
	must(t, err)
	before := rulesOf(t, rules)
	a, err := n.Attach(ctx, "data", client.Attachment{
		Holder: "sandbox:job", Target: client.Target{Type: "host", Path: dir}, Limits: &client.RateLimits{WriteIOPS: 4321, ReadBytes: 1 << 30},
	})
	must(t, err)
	if a.Limits == nil || a.Limits.WriteIOPS != 4321 || a.Enforcement == nil || len(a.Enforcement.Gaps) == 0 {
		t.Errorf("%+v", a)
	}
	device := strings.Fields(added(t, before, rulesOf(t, rules), "write_iops 4321", "read_bps 1073741824"))[1]
	n.kill()
	added(t, before, rulesOf(t, rules), "write_iops 4321", "read_bps 1073741824")
	// A rule that the daemon had not come to set when it died.
	must(t, os.WriteFile(rules+"write_iops_device", []byte(device+" 0"), 0))
	n.start()
	added(t, before, rulesOf(t, rules), "write_iops 4321", "read_bps 1073741824")
	_, err = n.SetLimits(ctx, "data", a.ID, client.RateLimits{ReadIOPS: 99})
	must(t, err)
	added(t, before, rulesOf(t, rules), "read_iops 99")
	_, err = n.Detach(ctx, "data", a.ID)
	must(t, err)
	added(t, before, rulesOf(t, rules))
}

// rulesOf lists the rules of the root cgroup as "kind device value".
func rulesOf(t *testing.T, files string) []string {
	t.Helper()
	var list []string
	for _, kind := range []string{"read_iops", "write_iops", "read_bps", "write_bps"} {
		b, err := os.ReadFile(files + kind + "_device")
		must(t, err)
		for line := range strings.Lines(string(b)) {
			list = append(list, kind+" "+strings.TrimSpace(line))
		}
	}
	return list
}

// added compares two lists of rules; want are "kind value". It gives the first
// new rule.
func added(t *testing.T, before, now []string, want ...string) string {
	t.Helper()
	var kinds, first = []string{}, ""
	for _, rule := range now {
		if slices.Contains(before, rule) {
			continue
		}
		f := strings.Fields(rule)
		kinds = append(kinds, f[0]+" "+f[2])
		if first == "" {
			first = rule
		}
	}
	slices.Sort(kinds)
	slices.Sort(want)
	if !slices.Equal(kinds, want) {
		t.Fatalf("new rules %v, want %v", kinds, want)
	}
	return first
}

package main_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
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
		wrote := make(chan error, 1)
		go func() { wrote <- os.WriteFile(filepath.Join(dir, name), []byte("held"), 0o644) }()
		select {
		case err := <-wrote:
			must(t, err)
			if time.Now().Before(f.Until) { // else the freeze may have ended on a slow machine
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

// TestCaptureUnderAWriter captures volumes that are being written to: every file
// that had been flushed before the request is in the version, whole, and the
// writer goes on.
func TestCaptureUnderAWriter(t *testing.T) {
	n, ctx := newNode(t, "--overprovision", "100"), context.Background()
	for name, c := range map[string]struct {
		fs   string
		size int64 // MiB; ext4 below 16 has no journal: it is frozen, as btrfs is
	}{"ext4": {"ext4", 200}, "small": {"ext4", 12}, "xfs": {"xfs", 300}, "btrfs": {"btrfs", 300}} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(n.state, "attach", name)
			_, err := n.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Size: c.size, Filesystem: c.fs}}, "")
			must(t, err)
			_, err = n.Attach(ctx, name, client.Attachment{Holder: "sandbox:job", Target: client.Target{Type: "host", Path: dir}})
			must(t, err)
			w := startFlusher(dir)
			var versions []string
			var flushed, frozen []int64
			for len(versions) < 2 {
				w.waitFor(t, int64(20*(len(versions)+1)))
				flushed = append(flushed, w.flushed.Load())
				made, err := n.Capture(ctx, name, "of-"+name, "")
				must(t, err)
				versions, frozen = append(versions, made.Version.Name), append(frozen, int64(made.FrozenMilliseconds*1000))
			}
			w.waitFor(t, w.flushed.Load()+5)
			must(t, w.stop())
			t.Logf("held for %d µs", frozen)
			for i, version := range versions {
				copied := name + "-" + version
				_, err := n.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: copied}, Spec: client.VolumeSpec{Size: max(c.size, 64), Template: "of-" + name + ":" + version}}, "")
				must(t, err)
				for k := range min(flushed[i], mostFlushed) {
					var b bytes.Buffer
					must(t, n.ReadFile(ctx, copied, fmt.Sprintf("/f%05d", k), &b))
					if !bytes.Equal(b.Bytes(), contentOf(k)) {
						t.Fatalf("version %s: file %d, flushed before the capture, has %d bytes", version, k, b.Len())
					}
				}
			}
		})
	}
}

// mostFlushed is how many files a flusher makes; then it writes one again and again:
// a small volume has few inodes, and a capture may take its time.
const mostFlushed = 100

// flusher makes one file after the other and flushes each.
type flusher struct {
	flushed atomic.Int64 // writes that are durable
	quit    chan struct{}
	ended   chan error
}

func contentOf(k int64) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%06d\n", k), 1000+int(k%100))
}

func startFlusher(dir string) *flusher {
	w := &flusher{quit: make(chan struct{}), ended: make(chan error, 1)}
	go func() {
		for k := int64(0); ; k++ {
			select {
			case <-w.quit:
				w.ended <- nil
				return
			default:
			}
			if err := writeFlushed(filepath.Join(dir, fmt.Sprintf("f%05d", min(k, mostFlushed))), contentOf(k)); err != nil {
				w.ended <- err
				return
			}
			w.flushed.Store(k + 1)
		}
	}()
	return w
}

func writeFlushed(path string, content []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Sync(), f.Close())
	dir, open := os.Open(filepath.Dir(path))
	if open != nil {
		return errors.Join(err, open)
	}
	return errors.Join(err, dir.Sync(), dir.Close())
}

// waitFor waits until so many files are durable.
func (w *flusher) waitFor(t *testing.T, files int64) {
	t.Helper()
	for deadline := time.Now().Add(patience); w.flushed.Load() < files; time.Sleep(time.Millisecond) {
		select {
		case err := <-w.ended:
			t.Fatalf("the writer ended after %d files: %v", w.flushed.Load(), err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("the writer stands still after %d files", w.flushed.Load())
		}
	}
}

func (w *flusher) stop() error {
	close(w.quit)
	return <-w.ended
}

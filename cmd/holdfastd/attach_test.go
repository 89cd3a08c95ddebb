package main_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/attach/runc/runctest"
)

func inContainer(c *runctest.Container, path string, readOnly bool) client.Attachment {
	return client.Attachment{Holder: "sandbox:" + c.ID, MountPath: path, ReadOnly: readOnly,
		Target: client.Target{Type: "runc", Container: c.ID, Root: c.Root}}
}

// atOnce runs all calls at the same time and gives their errors.
func atOnce(n int, call func(i int) error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = call(i) })
	}
	wg.Wait()
	return errs
}

// TestManyVolumesInOneSandbox: twenty attached at once, detached at once in any
// order; one below another, which holds that one until it is detached.
func TestManyVolumesInOneSandbox(t *testing.T) {
	const many = 20
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", c.Root)
	ctx := t.Context()
	name := func(i int) string { return fmt.Sprintf("v%02d", i) }
	for i := range many {
		n.create(name(i), client.VolumeSpec{Size: 4})
	}
	ids := make([]string, many)
	for i, err := range atOnce(many, func(i int) error {
		a, err := n.Attach(ctx, name(i), inContainer(c, "/volumes/"+name(i), false))
		ids[i] = a.ID
		return err
	}) {
		if err != nil {
			t.Fatalf("attach %d: %v", i, err)
		}
	}
	c.Shell("for v in /volumes/*; do echo ${v#/volumes/} >$v/name; done; sync")
	if got := c.Shell("grep -c ' /volumes/v' /proc/mounts"); got != strconv.Itoa(many)+"\n" {
		t.Errorf("mounts: %s", got)
	}
	order := rand.Perm(many)
	for i, err := range atOnce(many, func(i int) error { _, err := n.Detach(ctx, name(order[i]), ids[order[i]]); return err }) {
		if err != nil {
			t.Errorf("detach %s: %v", name(order[i]), err)
		}
	}
	if got := c.Shell("grep -c ' /volumes/v' /proc/mounts || true; ls -A /volumes/v03"); got != "0\n" {
		t.Errorf("after detach: %q", got)
	}

	outer, inner := n.attachTo(c, name(0), "/data"), n.attachTo(c, name(1), "/data/sub")
	if got := c.Shell("cat /data/name /data/sub/name"); got != "v00\nv01\n" {
		t.Errorf("one below the other: %q", got)
	}
	if _, err := n.Detach(ctx, name(0), outer.ID); client.Status(err) != 409 {
		t.Errorf("detach of the one above: %v", err)
	}
	if got := c.Shell("cat /data/name /data/sub/name"); got != "v00\nv01\n" {
		t.Errorf("after the refusal: %q", got)
	}
	_, err := n.Detach(ctx, name(1), inner.ID)
	must(t, err)
	_, err = n.Detach(ctx, name(0), outer.ID)
	must(t, err)
}

// TestManyReaders: 32 of one volume, in a container and on the host, and no writer
// beside them.
func TestManyReaders(t *testing.T) {
	const readers = 32
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", c.Root)
	ctx := t.Context()
	n.create("shared", client.VolumeSpec{Size: 16})
	dir, a := n.onHost("shared", false)
	must(t, os.WriteFile(filepath.Join(dir, "text"), []byte("to be read\n"), 0o644))
	_, err := n.Detach(ctx, "shared", a.ID)
	must(t, err)
	ids := make([]string, readers)
	for i, err := range atOnce(readers, func(i int) error {
		at := inContainer(c, fmt.Sprintf("/r/%d", i), true)
		if i%2 == 0 {
			at = client.Attachment{Holder: "sandbox:h", ReadOnly: true, Target: client.Target{Type: "host", Path: filepath.Join(n.state, "attach", strconv.Itoa(i))}}
		}
		a, err := n.Attach(ctx, "shared", at)
		ids[i] = a.ID
		return err
	}) {
		if err != nil {
			t.Fatalf("reader %d: %v", i, err)
		}
	}
	if _, err := n.Attach(ctx, "shared", inContainer(c, "/w", false)); client.Status(err) != 409 {
		t.Errorf("a writer: %v", err)
	}
	if got := c.Shell("cat /r/*/text | sort | uniq -c; touch /r/1/x 2>&1; true"); !strings.Contains(got, "16 to be read") || !strings.Contains(got, "Read-only") {
		t.Errorf("the readers see %q", got)
	}
	for i, err := range atOnce(readers, func(i int) error { _, err := n.Detach(ctx, "shared", ids[i]); return err }) {
		if err != nil {
			t.Errorf("detach of reader %d: %v", i, err)
		}
	}
	n.onHost("shared", false)
}

// kernelState is what a restart of the daemon must not change: the container's
// mounts, and which use of which device the volumes' images have.
func (n *node) kernelState(t *testing.T, c *runctest.Container) string {
	t.Helper()
	var lines []string
	for _, pid := range []int{c.Pid, os.Getpid()} {
		table, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
		must(t, err)
		for line := range strings.Lines(string(table)) {
			if strings.Contains(line, "/dev/loop") && (pid == c.Pid || strings.Contains(line, n.state)) {
				lines = append(lines, line)
			}
		}
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	must(t, err)
	for _, file := range loops {
		backing, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(backing), n.state) {
			continue // another's
		}
		sequence, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(file)), "diskseq"))
		must(t, err)
		lines = append(lines, file+" "+string(sequence)+string(backing))
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// TestRestartChangesNothing: the daemon drains and starts, and dies and starts,
// under a writer that must not see an error; attachments, mounts, devices and open
// files are what they were.
func TestRestartChangesNothing(t *testing.T) {
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", c.Root)
	ctx := t.Context()
	for _, fs := range []string{"ext4", "xfs"} {
		n.create(fs, client.VolumeSpec{Size: 320, Filesystem: fs})
		n.attachTo(c, fs, "/data/"+fs)
	}
	n.create("host", client.VolumeSpec{Size: 16})
	dir, _ := n.onHost("host", false)
	open, err := os.Create(filepath.Join(dir, "open"))
	must(t, err)
	defer open.Close()
	for _, fs := range []string{"ext4", "xfs"} {
		c.Background(strings.NewReplacer("DIR", "/data/"+fs, "NAME", fs).Replace(
			`exec 3>DIR/open; n=0
while :; do n=$((n+1)); echo $n >&3 && echo $n >DIR/new && sync DIR/new && mv DIR/new DIR/last || { echo $n >/tmp/failed-NAME; exit 1; }; echo $n >/tmp/tries; done`))
	}
	goesOn(t, c, 20)
	before := n.kernelState(t, c)
	attachments := func() (all []client.Attachment) {
		for _, v := range []string{"ext4", "xfs", "host"} {
			some, err := n.Attachments(ctx, v)
			must(t, err)
			all = append(all, some...)
		}
		return all
	}
	recorded := attachments()
	for _, end := range []func(){n.stop, n.kill} {
		end()
		goesOn(t, c, 20)
		n.start()
		if now := n.kernelState(t, c); now != before {
			t.Errorf("mounts or devices were\n%sand are\n%s", before, now)
		}
		if now := attachments(); fmt.Sprint(now) != fmt.Sprint(recorded) {
			t.Errorf("attachments were\n%+v\nand are\n%+v", recorded, now)
		}
		if _, err := open.WriteString("still open\n"); err != nil {
			t.Error(err)
		}
		goesOn(t, c, 20)
	}
	if got := c.Shell("cat /tmp/failed-* 2>/dev/null || true"); got != "" {
		t.Errorf("a write failed: %s", got)
	}
	c.Kill()
}

// TestEndOfASandbox is noticed at once while the daemon runs, and when it starts
// after it.
func TestEndOfASandbox(t *testing.T) {
	first, second := runctest.Start(t, runctest.Options{}), runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", first.Root+","+second.Root)
	ctx := t.Context()
	gone := func(c *runctest.Container) {
		t.Helper()
		v, err := n.Volume(ctx, "data")
		must(t, err)
		said := false
		for _, e := range v.Events {
			said = said || e.Message == "sandbox:"+c.ID+" is gone"
		}
		if len(v.State.Attachments) != 0 || !said {
			t.Errorf("attachments %+v, events %+v", v.State.Attachments, v.Events)
		}
	}
	n.create("data", client.VolumeSpec{Size: 16})
	n.attachTo(first, "data", "/data")
	first.Shell("echo written >/data/file")
	begin := time.Now()
	first.Kill()
	n.untilDetached(t, "data")
	t.Logf("noticed %v after the kill began", time.Since(begin))
	gone(first)

	n.attachTo(second, "data", "/data")
	n.stop()
	second.Kill()
	n.start()
	n.untilDetached(t, "data")
	gone(second)
	dir, _ := n.onHost("data", false)
	if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(got) != "written\n" {
		t.Errorf("%q, %v", got, err)
	}
}

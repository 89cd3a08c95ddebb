package limit

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/loop"
	"holdfast/internal/sys"
)

// host is a directory that looks like a host with cgroups.
type host struct {
	t    *testing.T
	dir  string
	list []*mountinfo.Info
}

func newHost(t *testing.T) *host { return &host{t: t, dir: t.TempDir()} }

func (h *host) file(name, content string) string {
	h.t.Helper()
	path := filepath.Join(h.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		h.t.Fatal(err)
	}
	return path
}

func (h *host) v1(groups ...string) {
	for _, g := range append(groups, "") {
		for _, f := range []string{v1ReadIOPS, v1WriteIOPS, v1ReadBytes, v1WriteBytes} {
			h.file("blkio/"+g+"/"+f, "")
		}
	}
	h.list = append(h.list, &mountinfo.Info{FSType: "cgroup", Root: "/", Mountpoint: filepath.Join(h.dir, "blkio"), VFSOptions: "rw,blkio"})
}

func (h *host) v2(controllers string, groups ...string) {
	h.file("unified/cgroup.controllers", controllers)
	for _, g := range groups {
		h.file("unified/"+g+"/"+v2Max, "")
	}
	h.list = append(h.list, &mountinfo.Info{FSType: "cgroup2", Root: "/", Mountpoint: filepath.Join(h.dir, "unified")})
}

func (h *host) process(pid int, cgroups string) { h.file("proc/"+strconv.Itoa(pid)+"/cgroup", cgroups) }

func (h *host) limiter() *Limiter {
	l := find(filepath.Join(h.dir, "proc"), h.list)
	l.startTime = func(int) (uint64, error) { return 77, nil }
	return l
}

func (h *host) is(name, want string) {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.dir, name))
	if err != nil || string(b) != want {
		h.t.Errorf("%s: %q, want %q (%v)", name, b, want, err)
	}
}

func anyDevice(t *testing.T) (path, number string) {
	t.Helper()
	for _, path := range []string{"/dev/loop0", "/dev/vda", "/dev/sda", "/dev/null"} {
		if p, err := sys.PlaceBehind(path); err == nil {
			major, minor := sys.MajorMinor(p.RDevice)
			return path, strconv.Itoa(int(major)) + ":" + strconv.Itoa(int(minor))
		}
	}
	t.Fatal("no device node")
	return "", ""
}

var (
	inside = attach.Target{Type: "runc", Pid: 12, StartTime: 77}
	four   = blockdev.Limits{ReadIOPS: 100, WriteIOPS: 200, ReadBytes: 300, WriteBytes: 400}
)

func TestV1HasTwoCgroupsPerWriter(t *testing.T) {
	h := newHost(t)
	h.v1("box")
	h.v2("") // hybrid: no controllers there
	h.process(12, "9:name=systemd:/\n7:blkio:/box\n0::/\n")
	l, ctx := h.limiter(), context.Background()
	device, number := anyDevice(t)
	check := func(group, readIOPS, writeIOPS, readBytes, writeBytes string) {
		t.Helper()
		for f, want := range map[string]string{v1ReadIOPS: readIOPS, v1WriteIOPS: writeIOPS, v1ReadBytes: readBytes, v1WriteBytes: writeBytes} {
			if want != "" {
				want = number + " " + want
			}
			h.is("blkio/"+group+"/"+f, want)
		}
	}
	if err := l.Apply(ctx, device, inside, false, four); err != nil {
		t.Fatal(err)
	}
	check("box", "100", "200", "300", "400")
	check("", "", "200", "", "400") // what the kernel writes back
	h.v1("box")                     // empty again
	if err := l.Apply(ctx, device, inside, false, blockdev.Limits{}); err != nil {
		t.Fatal(err)
	}
	check("box", "0", "0", "0", "0")
	check("", "", "0", "", "0")
	h.v1()
	if err := l.Apply(ctx, device, attach.Target{Type: "host", Path: "/x"}, false, four); err != nil {
		t.Fatal(err)
	}
	check("", "100", "200", "300", "400")
	if e, err := l.Explain(inside, false); err != nil || len(e.Gaps) != 2 || !strings.Contains(e.Mechanism, "v1") {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestReaderLeavesTheRootCgroupAlone(t *testing.T) {
	h := newHost(t)
	h.v1("box")
	h.process(12, "7:blkio:/box\n")
	device, _ := anyDevice(t)
	if err := h.limiter().Apply(context.Background(), device, inside, true, four); err != nil {
		t.Fatal(err)
	}
	h.is("blkio/"+v1WriteBytes, "")
	h.is("blkio/"+v1ReadBytes, "")
}

func TestV2(t *testing.T) {
	h := newHost(t)
	h.v2("cpuset cpu io memory pids", "box", "plain")
	h.process(12, "0::/box\n")
	h.process(13, "0::/elsewhere\n")
	h.process(14, "0::/\n")
	h.process(15, "0::/../../outside\n")
	l, ctx := h.limiter(), context.Background()
	device, number := anyDevice(t)
	if err := l.Apply(ctx, device, inside, false, blockdev.Limits{WriteIOPS: 200, ReadBytes: 300}); err != nil {
		t.Fatal(err)
	}
	h.is("unified/box/"+v2Max, number+" rbps=300 wbps=max riops=max wiops=200")
	if err := l.Apply(ctx, device, inside, false, blockdev.Limits{}); err != nil {
		t.Fatal(err)
	}
	h.is("unified/box/"+v2Max, number+" rbps=max wbps=max riops=max wiops=max")
	for pid, part := range map[int]string{13: "not enabled", 14: "root cgroup", 15: "not below", 0: "whole host"} {
		target := attach.Target{Pid: pid, StartTime: 77}
		err := l.Apply(ctx, device, target, false, four)
		if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), h.dir) {
			t.Errorf("process %d: %v", pid, err)
		}
	}
}

func TestGoneSandbox(t *testing.T) {
	h := newHost(t)
	h.v1()
	l, ctx := h.limiter(), context.Background()
	device, _ := anyDevice(t)
	h.process(13, "7:blkio:/removed\n")
	reused := attach.Target{Pid: 13, StartTime: 1}
	for _, gone := range []attach.Target{inside, reused} {
		if err := l.Apply(ctx, device, gone, true, four); !errors.Is(err, blockdev.ErrGone) {
			t.Errorf("%+v: %v", gone, err)
		}
		if err := l.Apply(ctx, device, gone, true, blockdev.Limits{}); err != nil {
			t.Errorf("lifting from %+v: %v", gone, err)
		}
	}
	// The process is there, its cgroup was removed: nothing to lift.
	if err := l.Apply(ctx, device, attach.Target{Pid: 13, StartTime: 77}, true, blockdev.Limits{}); err != nil {
		t.Error(err)
	}
}

func TestHostWithoutController(t *testing.T) {
	h := newHost(t)
	h.v2("cpu memory")
	h.list = append(h.list, &mountinfo.Info{FSType: "cgroup", Root: "/docker/x", Mountpoint: h.dir, VFSOptions: "rw,blkio"})
	l := h.limiter()
	device, _ := anyDevice(t)
	if err := l.Apply(context.Background(), device, inside, false, four); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	if err := l.Apply(context.Background(), device, inside, false, blockdev.Limits{}); err != nil {
		t.Errorf("nothing to lift: %v", err)
	}
	h.v1()
	for _, bad := range []blockdev.Limits{{ReadIOPS: -1}, {WriteIOPS: MaxIOPS + 1}} {
		if err := h.limiter().Apply(context.Background(), device, attach.Target{}, false, bad); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// TestKernelTakesAndForgetsRules sets limits on a real device, reads them back
// from the kernel, and leaves none. How well they hold is measured in bench.
func TestKernelTakesAndForgetsRules(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop)
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Explain(attach.Target{}, false); err != nil {
		t.Skip("this host cannot limit the whole host:", err)
	}
	blockdevtest.LeakCheck(t)
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err == nil {
		err = f.Truncate(1 << 20)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	device, err := loop.Attach(f, false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := device.Detach(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	place, err := sys.PlaceBehind(device.Path)
	if err != nil {
		t.Fatal(err)
	}
	major, minor := sys.MajorMinor(place.RDevice)
	rule := strconv.Itoa(int(major)) + ":" + strconv.Itoa(int(minor)) + " "
	read := func(file string) string {
		b, err := os.ReadFile(filepath.Join(l.v1, file))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if value, ok := strings.CutPrefix(line, rule); ok {
				return strings.TrimSpace(value)
			}
		}
		return ""
	}
	if err := l.Apply(t.Context(), device.Path, attach.Target{}, false, four); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{v1ReadIOPS: "100", v1WriteIOPS: "200", v1ReadBytes: "300", v1WriteBytes: "400"} {
		if have := read(file); have != want {
			t.Errorf("%s: %q, want %s", file, have, want)
		}
	}
	if err := l.Apply(t.Context(), device.Path, attach.Target{}, false, blockdev.Limits{}); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{v1ReadIOPS, v1WriteIOPS, v1ReadBytes, v1WriteBytes} {
		if have := read(file); have != "" {
			t.Errorf("%s is left: %q", file, have)
		}
	}
}

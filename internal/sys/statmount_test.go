package sys_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"holdfast/internal/sys"
)

// TestMountAtAgreesWithMountinfo asks about every mount of this namespace both ways.
func TestMountAtAgreesWithMountinfo(t *testing.T) {
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	top := map[string]*mountinfo.Info{}
	for _, m := range all {
		top[m.Mountpoint] = m
	}
	asked := 0
	for point, want := range top {
		got, root, err := sys.MountAt(point)
		if errors.Is(err, errors.ErrUnsupported) {
			t.Fatal("this kernel cannot tell of one mount: attach latency grows with the mounts there")
		}
		if err != nil || !root || int(got.ID) != want.ID {
			continue // covered by a mount above it, or unmounted meanwhile
		}
		asked++
		_, shared, _ := strings.Cut(want.Optional, "shared:")
		shared, _, _ = strings.Cut(shared, " ")
		group, _ := strconv.ParseUint(shared, 10, 64)
		ro := func(options string) bool { return strings.HasPrefix(options+",", "ro,") }
		wantType, _, _ := strings.Cut(want.FSType, ".")
		if int(got.Parent) != want.Parent || got.Device != sys.Device(want.Major, want.Minor) || got.Path != want.Mountpoint ||
			got.Type != wantType || got.Source != want.Source && want.Source != "none" || got.ReadOnly != ro(want.Options) ||
			got.ReadOnlyFS != ro(want.VFSOptions) || got.Group != group {
			t.Errorf("%s:\n got %+v\nwant %+v", point, got, want)
		}
	}
	if asked < 3 {
		t.Errorf("only %d of %d mounts could be compared", asked, len(all))
	}
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id, err := sys.MountID(f)
	if m, err2 := sys.MountOf(f); err != nil || err2 != nil || m.ID != id || m.Type != "proc" {
		t.Errorf("of an open file: %+v, %v; fdinfo has %d, %v", m, err2, id, err)
	}
	if _, root, err := sys.MountAt(t.TempDir()); err != nil || root {
		t.Errorf("a plain directory is a mount: %t, %v", root, err)
	}
	if _, _, err := sys.MountAt(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing path: %v", err)
	}
}

func TestOnlyOpening(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	expect := func(want bool) {
		t.Helper()
		if got, err := sys.OnlyOpening(f); err != nil || got != want {
			t.Errorf("only opening: %t, %v; want %t", got, err, want)
		}
	}
	expect(true)
	for _, flag := range []int{os.O_RDONLY, os.O_RDWR} {
		other, err := os.OpenFile(name, flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		expect(false)
		other.Close()
		expect(true)
	}
	reader, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if got, err := sys.OnlyOpening(reader); err != nil || got {
		t.Errorf("a reader beside a writer: %t, %v", got, err)
	}
}

func TestAwaitEnd(t *testing.T) {
	c := exec.Command("sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	pidfd, err := sys.OpenPidfd(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	early := t.Context()
	done := make(chan error, 1)
	go func() { done <- sys.AwaitEnd(early, pidfd) }()
	select {
	case err := <-done:
		t.Fatalf("the end of a living process: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := sys.KillProcess(pidfd); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	_ = c.Wait()
	if err := sys.KillProcess(pidfd); err != nil {
		t.Errorf("again: %v", err)
	}
}

func TestAwaitEndIsCutShort(t *testing.T) {
	pidfd, err := sys.OpenPidfd(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- sys.AwaitEnd(ctx, pidfd) }()
	cancel()
	if err := <-done; !errors.Is(err, ctx.Err()) || err == nil {
		t.Errorf("%v", err)
	}
}

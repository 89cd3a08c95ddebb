package host_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/attachtest"
	"holdfast/blockdev/attach/host"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
)

func TestAttachAndDetach(t *testing.T) {
	for _, kind := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		t.Run(string(kind), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			ctx := context.Background()
			v := attachtest.New(t, kind)
			s := attachtest.Stage(t)
			stage := v.Mount(t, s)
			a, prefix := attacher(t)
			target := resolve(t, a, filepath.Join(prefix, "tenant/data"))
			r := v.Request(stage, target, "")
			expect(t, a, r, attach.StateMissing)
			for range 2 {
				if err := a.Attach(ctx, r); err != nil {
					t.Fatal(err)
				}
			}
			expect(t, a, r, attach.StateAttached)
			if err := os.WriteFile(filepath.Join(target.Path, "file"), []byte("text"), 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(filepath.Join(stage, "file")); string(got) != "text" {
				t.Errorf("the stage shows %q, %v", got, err)
			}
			for range 2 {
				if err := a.Detach(ctx, r); err != nil {
					t.Fatal(err)
				}
			}
			expect(t, a, r, attach.StateMissing)
			if info, err := os.Stat(target.Path); err != nil || info.Mode().Perm() != 0o755 {
				t.Errorf("the directory that was made: %v %v", info, err)
			}
			if err := s.Unmount(ctx, v.ID); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDetachRefusesWhatIsInUse(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	v := attachtest.New(t, filesystem.Ext4)
	stage := v.Mount(t, attachtest.Stage(t))
	a, prefix := attacher(t)
	r := v.Request(stage, resolve(t, a, filepath.Join(prefix, "data")), "")
	if err := a.Attach(ctx, r); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(r.Target.Path, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = a.Detach(ctx, r)
	if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("detach with an open file: %v", err)
	}
	expect(t, a, r, attach.StateAttached)
	if _, err := f.WriteString("still works"); err != nil {
		t.Error(err)
	}
	f.Close()
	if err := a.Detach(ctx, r); err != nil {
		t.Error(err)
	}
}

// A filesystem that has shut down answers nothing, and can be taken away.
func TestDetachOfDeadFilesystem(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	v := attachtest.New(t, filesystem.XFS)
	s := attachtest.Stage(t)
	a, prefix := attacher(t)
	r := v.Request(v.Mount(t, s), resolve(t, a, filepath.Join(prefix, "data")), "")
	if err := a.Attach(ctx, r); err != nil {
		t.Fatal(err)
	}
	v.ShutDown(t, r.Mounted)
	expect(t, a, r, attach.StateAttached)
	detach(t, a, r)
	expect(t, a, r, attach.StateMissing)
	if err := s.Unmount(ctx, v.ID); !errors.Is(err, blockdev.ErrFailed) {
		t.Errorf("unmount of a dead filesystem: %v", err)
	}
}

func TestReadOnlyIsReadOnly(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	v := attachtest.New(t, filesystem.Ext4)
	stage := v.Mount(t, attachtest.Stage(t))
	a, prefix := attacher(t)
	r := v.Request(stage, resolve(t, a, filepath.Join(prefix, "data")), "")
	r.ReadOnly = true
	if err := a.Attach(ctx, r); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { detach(t, a, r) })
	if err := os.WriteFile(filepath.Join(r.Target.Path, "file"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("write to a read-only attachment: %v", err)
	}
	r.ReadOnly = false
	if err := a.Attach(ctx, r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("writable where it is read-only: %v", err)
	}
}

func TestAnotherVolumeIsThere(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	one, two := attachtest.New(t, filesystem.Ext4), attachtest.New(t, filesystem.Ext4)
	s := attachtest.Stage(t)
	a, prefix := attacher(t)
	target := resolve(t, a, filepath.Join(prefix, "data"))
	first, second := one.Request(one.Mount(t, s), target, ""), two.Request(two.Mount(t, s), target, "")
	if err := a.Attach(ctx, first); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { detach(t, a, first) })
	if err := a.Attach(ctx, second); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("attach over another volume: %v", err)
	}
	if err := a.Detach(ctx, second); err != nil { // it is not there
		t.Error(err)
	}
	expect(t, a, first, attach.StateAttached)
	expect(t, a, second, attach.StateMissing)
	if _, err := a.Resolve(ctx, attach.Target{Type: host.Type, Path: target.Path + "/inner"}, ""); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a target inside another volume: %v", err)
	}
	if _, err := os.Stat(filepath.Join(first.Mounted, "inner")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory was made in another volume: %v", err)
	}
}

func TestWithoutStageTheDeviceIdentifies(t *testing.T) {
	for _, kind := range []filesystem.Type{filesystem.Ext4, filesystem.Btrfs} {
		t.Run(string(kind), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			v := attachtest.New(t, kind)
			s := attachtest.Stage(t)
			a, prefix := attacher(t)
			r := v.Request(v.Mount(t, s), resolve(t, a, filepath.Join(prefix, "data")), "")
			if err := a.Attach(context.Background(), r); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("umount", r.Mounted).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			r.Mounted = ""
			expect(t, a, r, attach.StateAttached)
			if err := a.Attach(context.Background(), r); err != nil { // it is there
				t.Error(err)
			}
			detach(t, a, r)
			expect(t, a, r, attach.StateMissing)
			r.Mounted = filepath.Join(s.Dir(), "not-a-mount")
			if err := a.Attach(context.Background(), r); err == nil {
				t.Error("attached what is not on the stage")
			}
		})
	}
}

// After a reboot nothing is mounted or open: the volume is not there, and only
// where something else is mounted by now nobody can say.
func TestVolumeThatIsNotOpen(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	other := attachtest.New(t, filesystem.Ext4)
	a, prefix := attacher(t)
	target := resolve(t, a, filepath.Join(prefix, "data"))
	r := attach.Request{Volume: blockdevtest.NewID(blockdev.PrefixVolume), Target: target}
	expect(t, a, r, attach.StateMissing)
	detach(t, a, r)
	if err := a.Attach(ctx, r); err == nil {
		t.Error("attached what is not on the stage")
	}
	there := other.Request(other.Mount(t, attachtest.Stage(t)), target, "")
	if err := a.Attach(ctx, there); err != nil {
		t.Fatal(err)
	}
	if state, err := a.Probe(ctx, r); err == nil {
		t.Errorf("probe: %q", state)
	}
	if err := a.Detach(ctx, r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("detach: %v", err)
	}
	detach(t, a, there)
}

func TestResolveRefuses(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root)
	a, prefix := attacher(t)
	outside := t.TempDir()
	for _, err := range []error{
		os.Symlink(outside, filepath.Join(prefix, "link")),
		os.Symlink("/etc", filepath.Join(prefix, "etc")),
		os.WriteFile(filepath.Join(prefix, "file"), nil, 0o600),
		os.Mkdir(prefix+"-sibling", 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{
		"", "relative", prefix, prefix + "/", prefix + "/a/", prefix + "/../x", prefix + "/a/../b", prefix + "//a", prefix + "/./a",
		prefix + "-sibling/a", "/etc", "/", prefix + "/link", prefix + "/link/a", prefix + "/etc", prefix + "/file", prefix + "/file/a",
		prefix + "/a\x00b", prefix + "/a\nb", prefix + "/\xff", prefix + "/" + strings.Repeat("a", 256), prefix + strings.Repeat("/aaaaaaa", 600),
	} {
		if _, err := a.Resolve(context.Background(), attach.Target{Type: host.Type, Path: p}, ""); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("path %.80q: %v", p, err)
		}
	}
	good := attach.Target{Type: host.Type, Path: prefix + "/good"}
	if _, err := a.Resolve(context.Background(), good, "/elsewhere"); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a mount path: %v", err)
	}
	bad := good
	bad.Container = "name"
	if _, err := a.Resolve(context.Background(), bad, ""); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a container: %v", err)
	}
	bad = good
	bad.Pid = 1
	if got, err := a.Resolve(context.Background(), bad, good.Path); err != nil || got != good {
		t.Errorf("resolved %+v, %v", got, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("made outside the prefix: %v %v", left, err)
	}
	for _, p := range []string{"/", "relative", "/srv/", "/srv/../etc"} {
		if _, err := host.New([]string{p}); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("prefix %q: %v", p, err)
		}
	}
	none, err := host.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := none.Resolve(context.Background(), good, ""); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("with no prefix: %v", err)
	}
}

// The tenant swaps a directory for a symbolic link between Resolve and Attach.
func TestAttachFollowsNoLink(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	v := attachtest.New(t, filesystem.Ext4)
	a, prefix := attacher(t)
	outside := t.TempDir()
	r := v.Request(v.Mount(t, attachtest.Stage(t)), resolve(t, a, filepath.Join(prefix, "tenant/data")), "")
	swap(t, filepath.Join(prefix, "tenant"), outside)
	if err := a.Attach(ctx, r); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("attach through a link: %v", err)
	}
	expect(t, a, r, attach.StateMissing)
	detach(t, a, r)
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("made outside the prefix: %v %v", left, err)
	}
}

// The tenant renames a directory above the mount, which moves with it.
func TestDetachIsNotFooledByRenames(t *testing.T) {
	for _, readOnly := range []bool{false, true} {
		t.Run(fmt.Sprintf("readOnly=%t", readOnly), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			ctx := context.Background()
			v := attachtest.New(t, filesystem.Ext4)
			a, prefix := attacher(t)
			r := v.Request(v.Mount(t, attachtest.Stage(t)), resolve(t, a, filepath.Join(prefix, "tenant/data")), "")
			r.ReadOnly = readOnly
			if err := a.Attach(ctx, r); err != nil {
				t.Fatal(err)
			}
			back := swap(t, filepath.Join(prefix, "tenant"), t.TempDir()+"/none")
			if err := a.Detach(ctx, r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "moved/data") {
				t.Errorf("detach of what was moved away: %v", err)
			}
			expect(t, a, r, attach.StateAttached)
			back()
			detach(t, a, r)
			expect(t, a, r, attach.StateMissing)
		})
	}
}

// swap moves a directory aside and leaves a link to somewhere else; back undoes it.
func swap(t *testing.T, dir, to string) (back func()) {
	t.Helper()
	aside := filepath.Join(filepath.Dir(dir), "moved")
	if err := errors.Join(os.Rename(dir, aside), os.Symlink(to, dir)); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := errors.Join(os.Remove(dir), os.Rename(aside, dir)); err != nil {
			t.Fatal(err)
		}
	}
}

func attacher(t *testing.T) (a *host.Attacher, prefix string) {
	t.Helper()
	prefix = filepath.Join(t.TempDir(), "allowed")
	if err := os.Mkdir(prefix, 0o755); err != nil {
		t.Fatal(err)
	}
	a, err := host.New([]string{"/srv/elsewhere", prefix})
	if err != nil {
		t.Fatal(err)
	}
	return a, prefix
}

func resolve(t *testing.T, a *host.Attacher, path string) attach.Target {
	t.Helper()
	// The daemon's umask must not lock tenants out of directories on the way.
	defer syscall.Umask(syscall.Umask(0o077))
	target, err := a.Resolve(context.Background(), attach.Target{Type: host.Type, Path: path}, "")
	if err != nil {
		t.Fatal(err)
	}
	return target
}

func expect(t *testing.T, a *host.Attacher, r attach.Request, want attach.State) {
	t.Helper()
	if got, err := a.Probe(context.Background(), r); err != nil || got != want {
		t.Errorf("probe: %q, %v; want %q", got, err, want)
	}
}

func detach(t *testing.T, a *host.Attacher, r attach.Request) {
	t.Helper()
	if err := a.Detach(context.Background(), r); err != nil {
		t.Error(err)
	}
}

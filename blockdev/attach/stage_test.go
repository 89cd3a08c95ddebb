package attach_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/attachtest"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
)

var mountable = []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs}

func TestStageMountsAndUnmounts(t *testing.T) {
	for _, fs := range mountable {
		t.Run(string(fs), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			ctx := context.Background()
			v, other := attachtest.New(t, fs), attachtest.New(t, fs)
			s := attachtest.Stage(t)

			dir := v.Mount(t, s)
			if again := v.Mount(t, s); again != dir {
				t.Errorf("mounted again at %s, not %s", again, dir)
			}
			for _, option := range []string{"nosuid", "nodev", "rw"} {
				if !slices.Contains(mountOptions(t, dir), option) {
					t.Errorf("options %v lack %s", mountOptions(t, dir), option)
				}
			}
			if _, err := s.Mount(ctx, v.ID, other.Endpoint, fs); !errors.Is(err, blockdev.ErrBusy) {
				t.Errorf("another device at the same place: %v", err)
			}
			write(t, filepath.Join(dir, "file"), "kept")
			expectMounted(t, s, v.ID, dir)
			if ids, err := s.List(ctx); err != nil || !slices.Equal(ids, []blockdev.ID{v.ID}) {
				t.Errorf("list: %v, %v", ids, err)
			}
			for range 2 {
				if err := s.Unmount(ctx, v.ID); err != nil {
					t.Fatal(err)
				}
			}
			expectMounted(t, s, v.ID, "")
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the mount point is left: %v", err)
			}

			v.Open(t, true) // another device, read-only
			v.Mount(t, s)
			if got := read(t, filepath.Join(dir, "file")); got != "kept" {
				t.Errorf("read back %q", got)
			}
			if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err == nil {
				t.Error("a read-only volume was written")
			}
			if _, err := s.Mount(ctx, v.ID, writable(v.Endpoint), fs); !errors.Is(err, blockdev.ErrBusy) {
				t.Errorf("writable where it is read-only: %v", err)
			}
		})
	}
}

func TestStageSurvivesItsProcess(t *testing.T) {
	blockdevtest.LeakCheck(t)
	v := attachtest.New(t, filesystem.Ext4)
	s := attachtest.Stage(t)
	dir := v.Mount(t, s)
	before := blockdevtest.MountsUnder(t, filepath.Dir(s.Dir()))
	group := peerGroup(t, s.Dir())
	again, err := attach.NewStage(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	if after := blockdevtest.MountsUnder(t, filepath.Dir(s.Dir())); !slices.Equal(before, after) {
		t.Errorf("mounts were %v, are %v", before, after)
	}
	if got := peerGroup(t, s.Dir()); got != group {
		t.Errorf("the peer group was %q, is %q: copies elsewhere are cut off", group, got)
	}
	expectMounted(t, again, v.ID, dir)
	if err := again.Unmount(context.Background(), v.ID); err != nil {
		t.Error(err)
	}
}

func TestStageUnmountRefusesWhatIsInUse(t *testing.T) {
	for _, fs := range mountable {
		t.Run(string(fs), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			ctx := context.Background()
			v := attachtest.New(t, fs)
			s := attachtest.Stage(t)
			dir := v.Mount(t, s)
			f, err := os.Create(filepath.Join(dir, "file"))
			if err != nil {
				t.Fatal(err)
			}
			err = s.Unmount(ctx, v.ID)
			if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "processes") {
				t.Errorf("unmount with an open file: %v", err)
			}
			expectMounted(t, s, v.ID, dir)
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if err := s.Unmount(ctx, v.ID); err != nil {
				t.Error(err)
			}
		})
	}
}

// Somebody else's mount namespace keeps the filesystem alive although the host
// has unmounted it: that is not "released", now and after a restart.
func TestStageUnmountWaitsForOtherNamespaces(t *testing.T) {
	for _, fs := range mountable {
		t.Run(string(fs), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			ctx := context.Background()
			v := attachtest.New(t, fs)
			s := attachtest.Stage(t)
			dir := v.Mount(t, s)
			write(t, filepath.Join(dir, "file"), "kept")
			end := namespaceCopy(t, s, "private")
			for range 2 {
				err := s.Unmount(ctx, v.ID)
				if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "namespaces of processes") {
					t.Fatalf("unmount while another namespace holds it: %v", err)
				}
				expectMounted(t, s, v.ID, dir)
				if got := read(t, filepath.Join(dir, "file")); got != "kept" {
					t.Errorf("read back %q", got)
				}
			}
			end()
			if err := s.Unmount(ctx, v.ID); err != nil {
				t.Fatal(err)
			}
			v.Close(t) // fails the test if the device is in use
		})
	}
}

// A service that begins while a volume is mounted copies the mount. That must
// not hold the volume for as long as the service runs.
func TestStageIsNotHeldByServices(t *testing.T) {
	for _, propagation := range []string{"slave", "shared", "unchanged"} {
		t.Run(propagation, func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			v := attachtest.New(t, filesystem.Ext4)
			s := attachtest.Stage(t)
			v.Mount(t, s)
			end := namespaceCopy(t, s, propagation)
			defer end()
			if err := s.Unmount(context.Background(), v.ID); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestReadOnlyMountOfDirtyJournal(t *testing.T) {
	for _, fs := range []filesystem.Type{filesystem.Ext4, filesystem.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			ctx := context.Background()
			v := attachtest.New(t, fs)
			s := attachtest.Stage(t)
			dir := v.Mount(t, s)
			write(t, filepath.Join(dir, "file"), "journalled")
			crashed := v.Image + ".crashed" // as a power cut would leave it
			copyFile(t, crashed, v.Image)
			if err := s.Unmount(ctx, v.ID); err != nil {
				t.Fatal(err)
			}
			v.Image = crashed
			v.Open(t, true)
			_, err := s.Mount(ctx, v.ID, v.Endpoint, fs)
			if !errors.Is(err, attach.ErrNeedsRecovery) || !errors.Is(err, blockdev.ErrBusy) {
				t.Fatalf("read-only mount of a dirty journal: %v", err)
			}
			t.Log(err)
			v.Open(t, false)
			v.Mount(t, s)
			if err := s.Unmount(ctx, v.ID); err != nil {
				t.Fatal(err)
			}
			v.Open(t, true)
			v.Mount(t, s)
			if got := read(t, filepath.Join(dir, "file")); got != "journalled" {
				t.Errorf("read back %q", got)
			}
		})
	}
}

// The filesystem has shut down, as XFS does when its device fails: what was
// written is lost, which is told, once, and the volume can be mounted again.
func TestFailedFlushIsTold(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	v := attachtest.New(t, filesystem.XFS)
	s := attachtest.Stage(t)
	dir := v.Mount(t, s)
	write(t, filepath.Join(dir, "flushed"), "kept")
	if err := os.WriteFile(filepath.Join(dir, "unflushed"), []byte("lost"), 0o600); err != nil {
		t.Fatal(err)
	}
	v.ShutDown(t, dir)
	if err := s.Unmount(ctx, v.ID); !errors.Is(err, blockdev.ErrFailed) {
		t.Errorf("unmount of a filesystem that is shut down: %v", err)
	}
	expectMounted(t, s, v.ID, "")
	if err := s.Unmount(ctx, v.ID); err != nil {
		t.Error(err)
	}
	v.Mount(t, s)
	if got := read(t, filepath.Join(dir, "flushed")); got != "kept" {
		t.Errorf("read back %q", got)
	}
}

func TestStageRefuses(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	v := attachtest.New(t, filesystem.Ext4)
	s := attachtest.Stage(t)
	file := blockdev.Endpoint{Kind: blockdev.File, Path: v.Image}
	gone := blockdev.Endpoint{Kind: blockdev.Block, Path: "/dev/no-such-device"}
	for _, c := range []struct {
		name string
		id   blockdev.ID
		e    blockdev.Endpoint
		fs   filesystem.Type
		want error
	}{
		{"an id that is a path", "../../etc", v.Endpoint, filesystem.Ext4, blockdev.ErrInvalid},
		{"no id", "", v.Endpoint, filesystem.Ext4, blockdev.ErrInvalid},
		{"a file", v.ID, file, filesystem.Ext4, blockdev.ErrInvalid},
		{"no filesystem", v.ID, v.Endpoint, filesystem.None, blockdev.ErrInvalid},
		{"a filesystem of ours that is not on it", v.ID, v.Endpoint, filesystem.XFS, blockdev.ErrCorrupt},
		{"no device", v.ID, gone, filesystem.Ext4, blockdev.ErrNotFound},
	} {
		if _, err := s.Mount(ctx, c.id, c.e, c.fs); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err := s.Unmount(ctx, c.id); !c.id.Valid() && !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("unmount, %s: %v", c.name, err)
		}
	}
	if entries, err := os.ReadDir(s.Dir()); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v %v", entries, err)
	}
	if info, err := os.Stat(s.Dir()); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the stage's mode is %v, %v", info.Mode(), err)
	}
	if _, err := attach.NewStage("relative"); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a relative stage: %v", err)
	}
}

// namespaceCopy starts a process in a mount namespace of its own, which begins
// with a copy of all mounts, and returns what ends it. Other tests' mounts
// are let go at once, wherever their temporary directories are, so that these are
// not held.
func namespaceCopy(t *testing.T, s *attach.Stage, propagation string) (end func()) {
	t.Helper()
	const script = `while read -r _ _ _ _ path _; do
		case $path in
		"$1"|"$1"/*) ;;
		*/Test*/*) mount --make-private "$path"; umount -l "$path" ;;
		esac
	done </proc/self/mountinfo 2>/dev/null
	echo ready; exec cat`
	cmd := exec.Command("unshare", "--mount", "--propagation", propagation, "sh", "-c", script, "sh", s.Dir())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	end = func() {
		in.Close()
		_ = cmd.Wait() // a second call: already waited for
	}
	t.Cleanup(end)
	return end
}

func writable(e blockdev.Endpoint) blockdev.Endpoint {
	e.ReadOnly = false
	return e
}

func expectMounted(t *testing.T, s *attach.Stage, id blockdev.ID, want string) {
	t.Helper()
	if dir, err := s.Mounted(context.Background(), id); err != nil || dir != want {
		t.Errorf("mounted at %q, %v; want %q", dir, err, want)
	}
}

func mountOptions(t *testing.T, dir string) []string {
	t.Helper()
	return strings.Split(mountinfoOf(t, dir)[5], ",")
}

func peerGroup(t *testing.T, dir string) string {
	t.Helper()
	for _, field := range mountinfoOf(t, dir)[6:] {
		if strings.HasPrefix(field, "shared:") {
			return field
		}
	}
	t.Fatalf("%s is in no peer group", dir)
	return ""
}

func mountinfoOf(t *testing.T, dir string) []string {
	t.Helper()
	for line := range strings.Lines(read(t, "/proc/self/mountinfo")) {
		if fields := strings.Fields(line); fields[4] == dir {
			return fields
		}
	}
	t.Fatalf("%s is not mounted", dir)
	return nil
}

func write(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func copyFile(t *testing.T, dst, src string) {
	t.Helper()
	text, err := os.ReadFile(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dst, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

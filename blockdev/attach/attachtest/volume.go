package attachtest

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/loop"
	"holdfast/internal/run"
)

// Volume is a filesystem on a loop device.
type Volume struct {
	ID       blockdev.ID
	Type     filesystem.Type
	Image    string // the device's backing file
	Endpoint blockdev.Endpoint

	device loop.Device
}

var needs = map[filesystem.Type]blockdevtest.Need{
	filesystem.Ext4: blockdevtest.Ext4, filesystem.XFS: blockdevtest.XFS, filesystem.Btrfs: blockdevtest.Btrfs,
}

// New makes a volume of the least size for its type; small ones are 16 MiB. Its
// device is detached when the test ends, and the test fails if that is refused.
func New(t testing.TB, fs filesystem.Type) *Volume {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, needs[fs])
	v := &Volume{ID: blockdevtest.NewID(blockdev.PrefixVolume), Type: fs}
	v.Image = filepath.Join(t.TempDir(), string(v.ID))
	size := max(fs.Minimum(), 16*filesystem.MiB)
	if err := os.WriteFile(v.Image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(v.Image, size); err != nil {
		t.Fatal(err)
	}
	if err := filesystem.NewTools().Make(context.Background(), v.Image, fs, filesystem.MakeOptions{}); err != nil {
		t.Fatal(err)
	}
	v.Open(t, false)
	t.Cleanup(func() { v.Close(t) })
	return v
}

// Open makes the volume's device, closing an earlier one.
func (v *Volume) Open(t testing.TB, readOnly bool) {
	t.Helper()
	v.Close(t)
	f, err := os.OpenFile(v.Image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if v.device, err = loop.Attach(f, readOnly); err != nil {
		t.Fatal(err)
	}
	v.Endpoint = blockdev.Endpoint{Kind: blockdev.Block, Path: v.device.Path, Size: v.device.Size, ReadOnly: readOnly}
}

// Close detaches the device; none is success.
func (v *Volume) Close(t testing.TB) {
	t.Helper()
	if v.device.Path == "" {
		return
	}
	if err := v.device.Detach(context.Background()); err != nil {
		t.Error(err)
	}
	v.device = loop.Device{}
}

// Grow makes the image and its device size bytes large, not the filesystem.
func (v *Volume) Grow(t testing.TB, size int64) {
	t.Helper()
	if err := os.Truncate(v.Image, size); err != nil {
		t.Fatal(err)
	}
	if _, err := v.device.Grow(); err != nil {
		t.Fatal(err)
	}
}

// Request asks for this volume, mounted at dir on the stage.
func (v *Volume) Request(dir string, target attach.Target, mountPath string) attach.Request {
	return attach.Request{Volume: v.ID, Endpoint: v.Endpoint, Mounted: dir, Target: target, MountPath: mountPath}
}

// Stage makes a stage that is taken away when the test ends, with the volumes
// that are still mounted on it; that fails if one is held.
func Stage(t testing.TB) *attach.Stage {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root)
	s, err := attach.NewStage(filepath.Join(t.TempDir(), "mounts"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		ids, err := s.List(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, id := range ids {
			if err := s.Unmount(ctx, id); err != nil {
				t.Error(err)
			}
		}
		if err := s.Teardown(ctx); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Mount mounts the volume on the stage and tells where. The stage's cleanup, or
// the test, unmounts it: make the volume before the stage.
func (v *Volume) Mount(t testing.TB, s *attach.Stage) string {
	t.Helper()
	dir, err := s.Mount(context.Background(), v.ID, v.Endpoint, v.Type)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// ShutDown makes XFS refuse everything from now on, as it does by itself when its
// device fails.
func (v *Volume) ShutDown(t testing.TB, dir string) {
	t.Helper()
	if _, err := run.Run(context.Background(), run.Cmd{Args: []string{"xfs_io", "-x", "-c", "shutdown", dir}}); err != nil {
		t.Fatal(err)
	}
}

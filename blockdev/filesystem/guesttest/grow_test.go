package guesttest

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"holdfast/blockdev/filesystem"
	"holdfast/internal/vmtest"
)

func TestMain(m *testing.M) {
	os.Exit(vmtest.Main(m, vmtest.Options{Disks: []int64{8 << 30}}))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// image makes a file on the guest's disk, which is not memory.
func image(t *testing.T, size int64) string {
	t.Helper()
	dir := t.TempDir()
	command(t, "mkfs.xfs", "-q", "-f", vmtest.Disks()[0])
	must(t, syscall.Mount(vmtest.Disks()[0], dir, "xfs", 0, ""))
	t.Cleanup(func() { must(t, syscall.Unmount(dir, 0)) })
	path := filepath.Join(dir, "image")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	return path
}

// TestGrowMountedExt4 grows a mounted ext4 from every size class by steps, with
// somebody writing, and looks at every byte and the filesystem afterwards.
func TestGrowMountedExt4(t *testing.T) {
	const mib = filesystem.MiB
	for _, sizes := range [][]int64{{32 * mib, 33 * mib, 200 * mib, 1 << 30}, {600 * mib, 4 << 30}} {
		t.Run(fmt.Sprint(sizes[0]/mib, "MiB"), func(t *testing.T) {
			x := filesystem.NewTools()
			must(t, x.CanGrowMounted(filesystem.Ext4))
			path := image(t, sizes[0])
			must(t, x.Make(t.Context(), path, filesystem.Ext4, filesystem.MakeOptions{}))
			device := command(t, "losetup", "--find", "--show", "--direct-io=on", path)
			dir := t.TempDir()
			must(t, syscall.Mount(device, dir, "ext4", 0, strings.Join(filesystem.MountOptions(filesystem.Ext4), ",")))

			stop, wrote := make(chan struct{}), make(chan map[string][32]byte)
			go func() { wrote <- write(t, dir, stop) }()
			for _, size := range sizes[1:] {
				must(t, os.Truncate(path, size))
				command(t, "losetup", "-c", device)
				must(t, x.GrowMounted(t.Context(), dir, filesystem.Ext4))
				must(t, x.GrowMounted(t.Context(), dir, filesystem.Ext4)) // nothing to do
				got, err := x.SizeMounted(t.Context(), dir, filesystem.Ext4)
				must(t, err)
				if size-got >= mib {
					t.Errorf("grown to %d bytes of %d", got, size)
				}
			}
			close(stop)
			files := <-wrote
			must(t, syscall.Unmount(dir, 0))
			must(t, x.Check(t.Context(), path, filesystem.Ext4, false))
			must(t, syscall.Mount(device, dir, "ext4", syscall.MS_RDONLY, ""))
			for name, sum := range files {
				b, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil || sha256.Sum256(b) != sum {
					t.Errorf("%s is not what was written: %v", name, err)
				}
			}
			must(t, syscall.Unmount(dir, 0))
			command(t, "losetup", "-d", device)
		})
	}
}

// write writes files until it is stopped and tells what is durable.
func write(t *testing.T, dir string, stop <-chan struct{}) map[string][32]byte {
	files := map[string][32]byte{}
	for n := 0; n < 200; n++ {
		select {
		case <-stop:
			return files
		default:
		}
		name := fmt.Sprintf("file-%03d", n)
		b := []byte(strings.Repeat(name+"\n", 4000))
		f, err := os.Create(filepath.Join(dir, name))
		if err == nil {
			_, err = f.Write(b)
		}
		if err == nil {
			err = f.Sync()
		}
		f.Close()
		if err != nil {
			t.Errorf("write while it grows: %v", err)
			return files
		}
		files[name] = sha256.Sum256(b)
	}
	<-stop
	return files
}

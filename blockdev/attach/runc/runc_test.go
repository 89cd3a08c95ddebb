package runc_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/attachtest"
	"holdfast/blockdev/attach/runc"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
)

// sysAdmin is what a container needs to mount and unshare by itself.
var sysAdmin = []string{"CAP_SYS_ADMIN"}

// fixture is a volume on a stage, and a container to attach it to.
type fixture struct {
	*testing.T
	v     *attachtest.Volume
	stage *attach.Stage
	c     *runctest.Container
	a     *runc.Attacher
	r     attach.Request // at /data
}

func setUp(t *testing.T, fs filesystem.Type, o runctest.Options) *fixture {
	t.Helper()
	t.Parallel() // much of the time is waiting for processes to end
	blockdevtest.LeakCheck(t)
	f := &fixture{T: t, v: attachtest.New(t, fs), stage: attachtest.Stage(t)}
	f.c = runctest.Start(t, o)
	f.a = attacher(t, f.c)
	f.r = f.v.Request(f.v.Mount(t, f.stage), f.resolve(), "/data")
	return f
}

func attacher(t *testing.T, c *runctest.Container) *runc.Attacher {
	t.Helper()
	a, err := runc.New(runc.Options{Root: c.Root})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (f *fixture) resolve() attach.Target {
	f.Helper()
	target, err := f.a.Resolve(context.Background(), attach.Target{Type: runc.Type, Container: f.c.ID}, "/data")
	if err != nil {
		f.Fatal(err)
	}
	return target
}

func (f *fixture) attach() {
	f.Helper()
	begin := time.Now()
	if err := f.a.Attach(context.Background(), f.r); err != nil {
		f.Fatal(err)
	}
	f.Logf("attached in %v", time.Since(begin))
}

func (f *fixture) detach() {
	f.Helper()
	begin := time.Now()
	if err := f.a.Detach(context.Background(), f.r); err != nil {
		f.Fatal(err)
	}
	f.Logf("detached in %v", time.Since(begin))
}

func (f *fixture) detachIsBusy(words string) {
	f.Helper()
	err := f.a.Detach(context.Background(), f.r)
	if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), words) {
		f.Errorf("detach: %v; want busy and %q", err, words)
	}
}

func (f *fixture) expect(want attach.State) {
	f.Helper()
	if got, err := f.a.Probe(context.Background(), f.r); err != nil || got != want {
		f.Errorf("probe: %q, %v; want %q", got, err, want)
	}
}

func (f *fixture) unmount() {
	f.Helper()
	if err := f.stage.Unmount(context.Background(), f.v.ID); err != nil {
		f.Error(err)
	}
}

func TestWhatAContainerWritesIsOnTheVolume(t *testing.T) {
	for _, fs := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		for name, o := range map[string]runctest.Options{"": {}, ", user namespace": {UserNamespace: true}} {
			t.Run(string(fs)+name, func(t *testing.T) {
				ctx := context.Background()
				f := setUp(t, fs, o)
				f.r.MountPath = "/mnt/volumes/data"
				f.expect(attach.StateMissing)
				f.attach()
				f.attach()
				f.expect(attach.StateAttached)
				f.c.Shell("echo text >/mnt/volumes/data/file; chmod 600 /mnt/volumes/data/file; sync")
				if got := f.c.Shell("stat -c %u:%a /mnt/volumes/data/file /mnt/volumes"); got != "0:600\n"+rootOutside(o)+":755\n" {
					t.Errorf("inside, owner and mode are %q", got)
				}
				if got, err := os.ReadFile(filepath.Join(f.r.Mounted, "file")); string(got) != "text\n" {
					t.Errorf("the stage shows %q, %v", got, err)
				}
				if info, err := os.Stat(filepath.Join(f.r.Mounted, "file")); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
					t.Errorf("on the volume the owner is not 0: %+v, %v", info, err)
				}
				if got := f.c.Shell("grep -c ' /mnt/volumes/data .*nosuid,nodev' /proc/mounts"); got != "1\n" {
					t.Errorf("mounts with nosuid,nodev: %q", got)
				}
				if err := f.stage.Unmount(ctx, f.v.ID); !errors.Is(err, blockdev.ErrBusy) {
					t.Errorf("unmount while the container has it: %v", err)
				}
				f.expect(attach.StateAttached)
				f.detach()
				f.detach()
				f.expect(attach.StateMissing)
				if got := f.c.Shell("ls /mnt/volumes/data"); got != "" {
					t.Errorf("after detach the container sees %q", got)
				}
				f.unmount()
			})
		}
	}
}

// rootOutside is the owner, seen inside, of what the host's root makes.
func rootOutside(o runctest.Options) string {
	if o.UserNamespace {
		return "65534" // nobody: it has no number there
	}
	return "0"
}

func TestDetachRefusesWhatIsInUse(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	f.attach()
	pid := f.c.Background("exec sleep 1000 >/data/held")
	awaitFile(t, filepath.Join(f.r.Mounted, "held"))
	f.detachIsBusy(strconv.Itoa(pid))
	f.expect(attach.StateAttached)
	f.c.Shell("echo more >/data/file")
	f.c.Shell("kill -9 " + inside(t, pid))
	awaitEnd(t, pid)
	f.detach()
	f.unmount()
}

// A filesystem that has shut down answers nothing, and can be taken away.
func TestDetachOfDeadFilesystem(t *testing.T) {
	f := setUp(t, filesystem.XFS, runctest.Options{})
	f.attach()
	f.v.ShutDown(t, f.r.Mounted)
	f.expect(attach.StateAttached)
	f.detach()
	f.expect(attach.StateMissing)
	if err := f.stage.Unmount(context.Background(), f.v.ID); !errors.Is(err, blockdev.ErrFailed) {
		t.Errorf("unmount of a dead filesystem: %v", err)
	}
}

func TestKilledContainerIsGone(t *testing.T) {
	for _, fs := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			f := setUp(t, fs, runctest.Options{})
			f.attach()
			f.c.Background("exec sleep 1000 >/data/held")
			awaitFile(t, filepath.Join(f.r.Mounted, "held"))
			f.c.Kill()
			f.expect(attach.StateGone)
			f.detach()
			f.unmount()
			_, err := f.a.Resolve(context.Background(), attach.Target{Type: runc.Type, Container: f.c.ID}, "/data")
			if !errors.Is(err, blockdev.ErrGone) {
				t.Errorf("resolve a stopped container: %v", err)
			}
			f.r.Mounted = f.v.Mount(t, f.stage)
			if err := f.a.Attach(context.Background(), f.r); !errors.Is(err, blockdev.ErrGone) {
				t.Errorf("attach to a dead container: %v", err)
			}
		})
	}
}

// Another process has the pid of the container's first one, or had it before a
// reboot: it is not the sandbox, and is not touched.
func TestPidOfAnotherProcess(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	f.attach()
	right := f.r.Target
	for name, change := range map[string]func(*attach.Target){
		"start time": func(t *attach.Target) { t.StartTime-- },
		"boot":       func(t *attach.Target) { t.Boot = "7439e901-3d16-4b8b-8c9d-600ff60a4ccc" },
		"pid":        func(t *attach.Target) { t.Pid = 1 },
	} {
		f.r.Target = right
		change(&f.r.Target)
		f.expect(attach.StateGone)
		f.detach()
		if err := f.a.Attach(context.Background(), f.r); !errors.Is(err, blockdev.ErrGone) {
			t.Errorf("attach with another %s: %v", name, err)
		}
	}
	f.r.Target = right
	f.expect(attach.StateAttached)
	f.detach()
}

func TestUnresolvedTargetIsRefused(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	right := f.r.Target
	f.r.Target = attach.Target{Type: runc.Type, Container: f.c.ID}
	for _, err := range []error{f.a.Attach(context.Background(), f.r), f.a.Detach(context.Background(), f.r)} {
		if !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("unresolved: %v", err)
		}
	}
	f.r.Target = right
	f.r.Target.Pid = os.Getpid() // a container that shares the host's mount namespace
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndex(string(stat), ")")+1:]))
	if f.r.Target.StartTime, err = strconv.ParseUint(fields[19], 10, 64); err != nil {
		t.Fatal(err)
	}
	if err := f.a.Attach(context.Background(), f.r); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("attach to the host's own namespace: %v", err)
	}
}

// The stage is not mounted and nothing is open, but the container lives.
func TestVolumeThatIsNotOpen(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	full := f.r
	f.r = attach.Request{Volume: full.Volume, Target: full.Target, MountPath: full.MountPath}
	f.expect(attach.StateMissing)
	f.detach()
	if err := f.a.Attach(context.Background(), f.r); err == nil {
		t.Error("attached what is not on the stage")
	}
	f.r = full
	f.attach()
	f.r.Mounted, f.r.Endpoint = "", blockdev.Endpoint{}
	if state, err := f.a.Probe(context.Background(), f.r); err == nil {
		t.Errorf("probe: %q", state)
	}
	f.detachIsBusy("not on the stage")
	f.r = full
	f.r.Mounted = "" // the device alone tells
	f.expect(attach.StateAttached)
	f.detach()
	f.expect(attach.StateMissing)
}

func TestNoSymbolicLinkIsFollowed(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	f.c.Shell("ln -s /etc /data; mkdir /real; ln -s /real /link; ln -s /proc/1/root /magic; echo >/file")
	for _, p := range []string{"/data", "/link/data", "/magic/etc", "/file", "/file/data"} {
		f.r.MountPath = p
		if err := f.a.Attach(context.Background(), f.r); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("attach at %s: %v", p, err)
		}
		f.expect(attach.StateMissing)
	}
	if got := f.c.Shell("ls /etc /real"); got != "/etc:\n\n/real:\n" {
		t.Errorf("made through a link: %q", got)
	}
}

// Without pivot_root the container's root lies over the host's: what is mounted
// and made is the container's all the same.
func TestWithoutPivotRoot(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{NoPivot: true})
	f.r.MountPath = filepath.Join(t.TempDir(), "made-on-the-host")
	f.attach()
	f.c.Shell("echo >" + f.r.MountPath + "/written")
	if _, err := os.Lstat(f.r.MountPath); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the host has %s: %v", f.r.MountPath, err)
	}
	f.detach()
}

// A first process that changed its root sees less than its namespace has, and in
// a host that is a chroot itself less than the host has: nothing is mounted or
// made outside of what it sees.
func TestChangedRootIsRefused(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{
		Capabilities: []string{"CAP_SYS_CHROOT"},
		Args:         []string{"/bin/sh", "-c", "mkdir -p /sub/bin && cp /bin/busybox /sub/bin/ && exec chroot /sub /bin/busybox sleep 1000"},
	})
	deadline := time.Now().Add(time.Minute)
	for {
		root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", f.c.Pid))
		if err == nil && strings.HasSuffix(root, "/sub") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the root is %q, %v", root, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := f.a.Attach(context.Background(), f.r); !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "root") {
		t.Errorf("attach: %v", err)
	}
	f.expect(attach.StateMissing)
}

// The container swaps the mount path for a link as fast as it can, and moves
// directories above it: the volume is never mounted where a link leads, and
// detach always finds it.
func TestHostileNames(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	f.r.MountPath = "/a/data"
	f.c.Shell("mkdir -p /a/data /target; ln -s /target /a/link")
	f.c.Background("while :; do mv -T /a/data /a/real; ln -sT /target /a/data; rm /a/data; mv -T /a/real /a/data; done")
	f.c.Background("while :; do mv -T /a /b; mv -T /b /a; done")
	var attached, refused, busy int
	for range 150 {
		err := f.a.Attach(context.Background(), f.r)
		switch {
		case err == nil:
			attached++
		case errors.Is(err, blockdev.ErrInvalid), errors.Is(err, blockdev.ErrBusy):
			refused++
		default:
			t.Fatal(err)
		}
		table, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", f.c.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(table), " /target") {
			t.Fatalf("mounted where a link leads:\n%s", table)
		}
		for f.a.Detach(context.Background(), f.r) != nil {
			if busy++; busy > 100000 {
				t.Fatal(f.a.Detach(context.Background(), f.r))
			}
		}
		f.expect(attach.StateMissing)
	}
	t.Logf("attached %d, refused %d, detached again %d times", attached, refused, busy)
	if attached == 0 {
		t.Error("never attached")
	}
}

func TestDetachFindsWhatWasMovedOrMountedTwice(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{Capabilities: sysAdmin})
	f.r.MountPath = "/above/data"
	f.attach()
	f.c.Shell("mv /above /moved; mkdir /second /data; mount -o bind /moved/data /second")
	f.expect(attach.StateAttached)
	f.detach()
	f.expect(attach.StateMissing)
	if got := f.c.Shell("grep -c loop /proc/mounts || true"); got != "0\n" {
		t.Errorf("mounts of the volume that are left: %q", got)
	}

	f.r.MountPath = "/data"
	f.attach()
	f.c.Shell("mount -t tmpfs tmpfs /data")
	f.detachIsBusy("mounted something over it")
	f.expect(attach.StateAttached)
	f.c.Shell("umount /data; umount /data") // the container drops the volume by itself
	f.expect(attach.StateMissing)
	f.detach()
	f.attach()
	f.c.Shell("mkdir /data/below; mount -t tmpfs tmpfs /data/below")
	f.detachIsBusy("in use")
	f.c.Shell("umount /data/below")
	f.detach()
	f.unmount()
}

// A process in the container has a mount namespace of its own: out of sight of
// detach, but the filesystem lives, and only the stage can tell.
func TestStageWaitsForNamespacesInside(t *testing.T) {
	for _, fs := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			f := setUp(t, fs, runctest.Options{Capabilities: sysAdmin})
			f.attach()
			pid := f.c.Background("exec unshare -m sh -c 'touch /data/inside; exec sleep 1000'")
			awaitFile(t, filepath.Join(f.r.Mounted, "inside"))
			f.detach()
			f.expect(attach.StateMissing)
			err := f.stage.Unmount(context.Background(), f.v.ID)
			if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), strconv.Itoa(pid)) {
				t.Errorf("unmount while a namespace inside holds it: %v; want the name of process %d", err, pid)
			}
			f.c.Shell("kill -9 " + inside(t, pid))
			awaitEnd(t, pid)
			f.unmount()
		})
	}
}

func TestManyVolumesInOneContainer(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	var volumes []*attachtest.Volume
	for range 8 {
		volumes = append(volumes, attachtest.New(t, filesystem.Ext4))
	}
	s := attachtest.Stage(t)
	c := runctest.Start(t, runctest.Options{})
	a := attacher(t, c)
	requests := make([]attach.Request, len(volumes))
	var all sync.WaitGroup
	for i, v := range volumes {
		dir := v.Mount(t, s)
		all.Go(func() {
			path := fmt.Sprintf("/volumes/%d", i)
			target, err := a.Resolve(ctx, attach.Target{Type: runc.Type, Container: c.ID}, path)
			if err != nil {
				t.Error(err)
				return
			}
			requests[i] = v.Request(dir, target, path)
			if err := a.Attach(ctx, requests[i]); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	c.Shell("for i in 0 1 2 3 4 5 6 7; do echo $i >/volumes/$i/number; done; sync")
	for i, r := range requests {
		if got, err := os.ReadFile(filepath.Join(r.Mounted, "number")); string(got) != fmt.Sprintln(i) {
			t.Errorf("volume %d holds %q, %v", i, got, err)
		}
		if i > 0 {
			wrong := r
			wrong.MountPath = requests[0].MountPath
			if err := a.Attach(ctx, wrong); !errors.Is(err, blockdev.ErrBusy) {
				t.Errorf("attach over another volume: %v", err)
			}
		}
	}
	for i, r := range requests {
		all.Go(func() {
			if err := a.Detach(ctx, r); err != nil {
				t.Error(err)
			}
			if err := s.Unmount(ctx, volumes[i].ID); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

func TestReadOnlyIsReadOnly(t *testing.T) {
	for name, o := range map[string]runctest.Options{"plain": {}, "user namespace": {UserNamespace: true}} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t, filesystem.Ext4, o)
			f.r.ReadOnly = true
			f.attach()
			if out, err := f.c.Exec("touch", "/data/file"); err == nil || !strings.Contains(out, "Read-only file system") {
				t.Errorf("write: %q, %v", out, err)
			}
			f.r.ReadOnly = false
			if err := f.a.Attach(context.Background(), f.r); !errors.Is(err, blockdev.ErrBusy) {
				t.Errorf("writable where it is read-only: %v", err)
			}
			f.detach()
		})
	}
}

// With a read-only device not even a privileged container can write.
func TestReadOnlyDeviceResistsRemount(t *testing.T) {
	blockdevtest.LeakCheck(t)
	v := attachtest.New(t, filesystem.Ext4)
	v.Open(t, true)
	f := &fixture{T: t, v: v, stage: attachtest.Stage(t), c: runctest.Start(t, runctest.Options{Capabilities: sysAdmin})}
	f.a = attacher(t, f.c)
	f.r = v.Request(v.Mount(t, f.stage), f.resolve(), "/data")
	f.r.ReadOnly = true
	f.attach()
	if out, err := f.c.Exec("sh", "-c", "mount -o remount,bind,rw /data; mount -o remount,rw /data; touch /data/file"); err == nil {
		t.Errorf("wrote to a read-only device: %s", out)
	}
	f.detach()
}

func TestReadOnlyRootFilesystem(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{ReadOnlyRoot: true})
	err := f.a.Attach(context.Background(), f.r)
	if !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "does not exist and the filesystem") {
		t.Errorf("attach at a missing directory: %v", err)
	}
	for _, p := range []string{"/tmp/deep/data", "/etc"} { // on a tmpfs; a directory that exists
		f.r.MountPath = p
		f.attach()
		f.c.Shell("echo text >" + p + "/file")
		f.detach()
	}
	f.r.MountPath = "/tmp"
	if err := f.a.Attach(context.Background(), f.r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("attach over a tmpfs: %v", err)
	}
}

func TestGrowthIsSeenInside(t *testing.T) {
	for fs, grow := range map[filesystem.Type]int64{filesystem.XFS: 900, filesystem.Btrfs: 400} {
		t.Run(string(fs), func(t *testing.T) {
			f := setUp(t, fs, runctest.Options{})
			f.attach()
			before := blocksInside(f)
			f.v.Grow(t, grow*filesystem.MiB)
			if err := filesystem.NewTools().GrowMounted(context.Background(), f.r.Mounted, fs); err != nil {
				t.Fatal(err)
			}
			if after := blocksInside(f); after <= before || after < grow*1024*3/4 {
				t.Errorf("inside it had %d KiB and has %d", before, after)
			}
			f.detach()
		})
	}
}

// blocksInside asks statfs in the container, in KiB.
func blocksInside(f *fixture) int64 {
	f.Helper()
	fields := strings.Fields(f.c.Shell("stat -f -c '%b %S' /data"))
	blocks, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil {
		f.Fatal(err)
	}
	size, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		f.Fatal(err)
	}
	return blocks * size / 1024
}

func TestBeforeTheContainerStarts(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{
		OnlyCreate: true, Args: []string{"sh", "-c", "echo begun >/data/file; mkdir /data/begun; exec sleep 1000"},
	})
	f.attach()
	f.c.Start()
	awaitFile(t, filepath.Join(f.r.Mounted, "begun"))
	f.expect(attach.StateAttached)
	f.detach()
}

func TestPausedContainer(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	f.attach()
	f.c.Pause()
	t.Cleanup(f.c.Resume) // runc does not end a paused container
	_, err := f.a.Resolve(context.Background(), attach.Target{Type: runc.Type, Container: f.c.ID}, "/other")
	if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "paused") {
		t.Errorf("resolve a paused container: %v", err)
	}
	f.expect(attach.StateAttached)
	f.detach()
}

// awaitFile waits until a process in a container has made a file.
func awaitFile(t *testing.T, path string) {
	t.Helper()
	await(t, path, func() bool { _, err := os.Stat(path); return err == nil })
}

// awaitEnd waits until a process has let go of all that it had.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	await(t, fmt.Sprintf("the end of %d", pid), func() bool {
		_, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		return err != nil
	})
}

func await(t *testing.T, what string, there func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !there(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// inside tells a process's pid in its container.
func inside(t *testing.T, pid int) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if pids, ok := strings.CutPrefix(line, "NSpid:"); ok {
			fields := strings.Fields(pids)
			return fields[len(fields)-1]
		}
	}
	t.Fatalf("process %d has no NSpid", pid)
	return ""
}

package sys

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strconv"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// MountNamespace opens the mount namespace of a process. With a pidfd of that
// process that is still alive afterwards it is proven to be its own.
func MountNamespace(pid int) (*os.File, error) {
	return open("/proc/"+strconv.Itoa(pid)+"/ns/mnt", unix.O_RDONLY)
}

// RootOf opens the root directory of a process, as it is seen in the process's
// own mount namespace; see MountNamespace.
func RootOf(pid int) (*os.File, error) {
	return open("/proc/"+strconv.Itoa(pid)+"/root", unix.O_PATH|unix.O_DIRECTORY)
}

// UserNamespace opens the user namespace of a process; see MountNamespace.
func UserNamespace(pid int) (*os.File, error) {
	return open("/proc/"+strconv.Itoa(pid)+"/ns/user", unix.O_RDONLY)
}

// PidNamespace opens the pid namespace of a process; see MountNamespace.
func PidNamespace(pid int) (*os.File, error) {
	return open("/proc/"+strconv.Itoa(pid)+"/ns/pid", unix.O_RDONLY)
}

// SameNamespace reports whether two descriptors mean one namespace.
func SameNamespace(a, b *os.File) (bool, error) {
	pa, errA := PlaceOf(a)
	pb, errB := PlaceOf(b)
	return pa.Device == pb.Device && pa.Inode == pb.Inode, errors.Join(errA, errB)
}

// Inside is a mount namespace as seen from a thread that is in it. It is only
// valid during InMountNamespace.
type Inside struct {
	Root *os.File // the namespace's root (O_PATH)
	proc *os.File // our own /proc, which the namespace may lack
}

// Mountinfo opens the namespace's table of mounts, as proc_pid_mountinfo(5)
// describes it, with paths below Root.
func (in Inside) Mountinfo() (io.ReadCloser, error) { return in.openProc("thread-self/mountinfo") }

// MountID is MountID inside the namespace.
func (in Inside) MountID(f *os.File) (uint64, error) { return mountID(f, in.openProc) }

func (in Inside) openProc(path string) (*os.File, error) {
	var fd int
	err := control(in.proc, func(proc uintptr) error {
		return retry(func() (err error) {
			fd, err = unix.Openat(int(proc), path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			return err
		})
	})
	if err != nil {
		return nil, wrap("open", "/proc/"+path, err)
	}
	return os.NewFile(uintptr(fd), "/proc/"+path), nil
}

// UnmountAt takes the topmost mount at name away, which is one component below
// the opened directory. A symbolic link is not followed. See Unmount for errors.
func (in Inside) UnmountAt(dir *os.File, name string) error { return in.unmountAt(dir, name, 0) }

func (in Inside) unmountAt(dir *os.File, name string, flags int) error {
	err := control(dir, func(fd uintptr) error {
		if err := unix.Fchdir(int(fd)); err != nil { // of this thread alone
			return err
		}
		err := retry(func() error { return unix.Unmount(name, unix.UMOUNT_NOFOLLOW|flags) })
		return errors.Join(err, unix.Chdir("/"))
	})
	return wrap("umount", name, err)
}

// UnmountLazyAt is UnmountAt for a mount that may be in use: it goes from the
// namespace at once, with all below it; who has files of it open keeps them.
func (in Inside) UnmountLazyAt(dir *os.File, name string) error {
	return in.unmountAt(dir, name, unix.MNT_DETACH)
}

// Place opens a file or directory by its path below the root, as a place (O_PATH):
// for MoveMount. No symbolic link is followed.
func (in Inside) Place(path string) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	var fd int
	err := control(in.Root, func(root uintptr) error { return openat2(int(root), path, &how, &fd) })
	if err != nil {
		return nil, wrap("openat2", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// UnmountAt is Inside.UnmountAt in this process's own namespace.
func UnmountAt(dir *os.File, name string) error {
	return here(func(in Inside) error { return in.UnmountAt(dir, name) })
}

// UnmountLazyAt is Inside.UnmountLazyAt in this process's own namespace.
func UnmountLazyAt(dir *os.File, name string) error {
	return here(func(in Inside) error { return in.UnmountLazyAt(dir, name) })
}

func here(fn func(in Inside) error) error {
	ns, err := open("/proc/thread-self/ns/mnt", unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer ns.Close()
	return InMountNamespace(ns, fn)
}

// InMountNamespace runs fn on a thread of its own inside a mount namespace, with
// the namespace's root as root and working directory. Paths that fn uses mean
// what they mean there; descriptors opened before keep their meaning. The thread
// is thrown away. Goroutines that fn starts are not inside.
func InMountNamespace(ns *os.File, fn func(in Inside) error) error {
	proc, err := open("/proc", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer proc.Close()
	done := make(chan error)
	go onThrowAwayThread(done, func() error {
		// A thread that shares root and working directory with others may not
		// change its mount namespace (setns(2)).
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare(CLONE_FS): %w", err)
		}
		if err := control(ns, func(fd uintptr) error { return unix.Setns(int(fd), unix.CLONE_NEWNS) }); err != nil {
			return wrap("setns", ns.Name(), err)
		}
		root, err := open("/", unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer root.Close()
		return fn(Inside{Root: root, proc: proc})
	})
	return <-done
}

// NewMountNamespace makes a mount namespace that holds, of the mounts of our own,
// the root and those at the places that keep names, and gets no new ones. Who
// starts in it holds no other filesystem, not for a moment.
func NewMountNamespace(keep func(place string) bool) (*os.File, error) {
	var ns *os.File
	done := make(chan error)
	go onThrowAwayThread(done, func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare(CLONE_NEWNS): %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return wrap("mount(private)", "/", err)
		}
		table, err := mountinfo.GetMounts(nil) // of this thread
		if err != nil {
			return err
		}
		if ns, err = open("/proc/thread-self/ns/mnt", unix.O_RDONLY); err != nil {
			return err
		}
		for _, m := range slices.Backward(table) { // later ones lie upon earlier ones
			if m.Mountpoint == "/" || keep(m.Mountpoint) {
				continue
			}
			err := unix.Unmount(m.Mountpoint, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
			// Covered by another, or gone with the one it was on.
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return errors.Join(wrap("umount", m.Mountpoint, err), ns.Close())
			}
		}
		return nil
	})
	if err := <-done; err != nil {
		return nil, err
	}
	return ns, nil
}

// onThrowAwayThread runs fn on a thread that ends with it. That must not be the
// main thread: it cannot end, and /proc/self would show its namespace for ever.
func onThrowAwayThread(done chan<- error, fn func() error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// Held here, the main thread cannot be given to the next goroutine.
		inner := make(chan error)
		go onThrowAwayThread(inner, fn)
		err := <-inner
		runtime.UnlockOSThread()
		done <- err
		return
	}
	// Not unlocked: the runtime ends a thread whose goroutine ends locked.
	err := fn()
	done <- err
}

package sys

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// MissingMountCalls names the system calls of the mount API that this kernel
// lacks, of those that attachments are made with. Each is called with arguments
// that no kernel accepts, so nothing happens.
func MissingMountCalls() []string {
	const bad = ^uintptr(0)
	calls := []struct {
		name string
		nr   uintptr
	}{
		{"open_tree", unix.SYS_OPEN_TREE},
		{"move_mount", unix.SYS_MOVE_MOUNT},
		{"fsopen", unix.SYS_FSOPEN},
		{"fsmount", unix.SYS_FSMOUNT},
		{"mount_setattr", unix.SYS_MOUNT_SETATTR},
		{"openat2", unix.SYS_OPENAT2},
	}
	var missing []string
	for _, c := range calls {
		_, _, errno := unix.Syscall6(c.nr, bad, 0, bad, 0, bad, 0)
		if errno == unix.ENOSYS {
			missing = append(missing, c.name)
		}
	}
	return missing
}

// KernelRelease is uname's release.
func KernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// OpenFileLimit is the number of descriptors that this process may have.
func OpenFileLimit() (uint64, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	return r.Cur, nil
}

// HasCapability reports whether this process has an effective capability, by
// its number in capabilities(7).
func HasCapability(number uint) (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, os.NewSyscallError("capget", err)
	}
	if number >= 64 {
		return false, errors.New("no such capability")
	}
	return data[number/32].Effective&(1<<(number%32)) != 0, nil
}

// The capabilities that are asked for.
const (
	CapSysAdmin    = unix.CAP_SYS_ADMIN
	CapSysResource = unix.CAP_SYS_RESOURCE
)

// FilesystemSpace is what statfs tells of a file system, in bytes.
type FilesystemSpace struct {
	Total  int64
	Free   int64  // for unprivileged users
	Device uint64 // st_dev: equal for two paths on one file system
	Type   int64  // its magic number in statfs(2)
}

// SpaceOf asks for the file system that holds path.
func SpaceOf(path string) (FilesystemSpace, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return FilesystemSpace{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return FilesystemSpace{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return FilesystemSpace{
		Total: int64(fs.Blocks) * fs.Bsize, Free: int64(fs.Bavail) * fs.Bsize, //nolint:gosec // block counts fit
		Device: st.Dev, Type: fs.Type,
	}, nil
}

package sys

import (
	"os"

	"golang.org/x/sys/unix"
)

// FileID is the identity of a file on this host.
type FileID struct {
	Device uint64 // st_dev
	Inode  uint64
}

// FileStatus is what fstat tells of a file.
type FileStatus struct {
	FileID
	Size      int64 // bytes
	Allocated int64 // bytes of occupied space
	Links     int64 // names that it has
}

// StatusOf asks for an open file's status.
func StatusOf(f *os.File) (FileStatus, error) {
	var st unix.Stat_t
	err := control(f, func(fd uintptr) error { return unix.Fstat(int(fd), &st) })
	if err != nil {
		return FileStatus{}, &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return fileStatus(st), nil
}

// StatusAt asks for the status of the file at path, which is not followed if it
// is a symbolic link.
func StatusAt(path string) (FileStatus, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return FileStatus{}, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return fileStatus(st), nil
}

func fileStatus(st unix.Stat_t) FileStatus {
	return FileStatus{FileID: FileID{Device: uint64(st.Dev), Inode: st.Ino}, Size: st.Size, Allocated: st.Blocks * 512, Links: int64(st.Nlink)} //nolint:unconvert,gosec // their types differ by architecture; a link count is small
}

// SyncData makes a file's bytes durable, and of the rest what finds them
// (fdatasync(2)). After an error what was written may be lost although a later call
// succeeds.
func SyncData(f *os.File) error {
	if err := control(f, func(fd uintptr) error { return retry(func() error { return unix.Fdatasync(int(fd)) }) }); err != nil {
		return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
	}
	return nil
}

// SyncDir makes the entries of a directory durable.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// RenameNew renames within one filesystem and fails with fs.ErrExist when to is
// there, even an empty directory.
func RenameNew(from, to string) error {
	err := retry(func() error {
		return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	})
	if err != nil {
		return &os.LinkError{Op: "renameat2", Old: from, New: to, Err: err}
	}
	return nil
}

// StartWriteback asks the kernel to begin writing what is dirty of f, and does
// not wait: a flush that follows has less to do. It promises nothing by itself.
func StartWriteback(f *os.File) error {
	err := control(f, func(fd uintptr) error {
		return retry(func() error { return unix.SyncFileRange(int(fd), 0, 0, unix.SYNC_FILE_RANGE_WRITE) })
	})
	return os.NewSyscallError("sync_file_range", err)
}

// SocketPair gives the two ends of a stream between two processes.
func SocketPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "socket pair"), os.NewFile(uintptr(fds[1]), "socket pair"), nil
}

// LimitFileSize keeps a process, and those that it starts from now on, from making
// any file longer than size bytes (RLIMIT_FSIZE, prlimit(2)).
func LimitFileSize(pid int, size uint64) error {
	return os.NewSyscallError("prlimit", unix.Prlimit(pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: size}, nil))
}

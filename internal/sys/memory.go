package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MapShared maps size bytes of a file from its beginning, to read and write what
// all others who map it see. errors.ErrUnsupported when the file is shorter: to
// touch what is beyond its end would end this process. Whoever has the file can
// still cut it afterwards.
func MapShared(fd int, size int64) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	if size <= 0 || st.Size < size || int64(int(size)) != size {
		return nil, fmt.Errorf("map %d bytes of a file of %d: %w", size, st.Size, errors.ErrUnsupported)
	}
	b, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	return b, os.NewSyscallError("mmap", err)
}

// Unmap takes away what MapShared gave.
func Unmap(b []byte) error { return os.NewSyscallError("munmap", unix.Munmap(b)) }

// MemoryFile makes a file of size zero bytes that is only in memory and cannot
// change its size (memfd_create(2)).
func MemoryFile(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		return nil, errors.Join(os.NewSyscallError("fcntl(F_ADD_SEALS)", err), f.Close())
	}
	return f, nil
}

// SignalEvent adds 1 to an eventfd, whatever its mode is, which stays as it is.
func SignalEvent(fd int) error {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, err := unix.Write(fd, one[:])
	return err
}

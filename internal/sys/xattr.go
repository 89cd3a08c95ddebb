package sys

import (
	"errors"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Xattrs reads the extended attributes of an open file or directory. None, on
// file systems that have none at all.
func Xattrs(f *os.File) (map[string][]byte, error) {
	attrs := map[string][]byte{}
	err := control(f, func(fd uintptr) error {
		names, err := sized(func(b []byte) (int, error) { return unix.Flistxattr(int(fd), b) })
		if errors.Is(err, unix.ENOTSUP) {
			return nil
		}
		if err != nil {
			return os.NewSyscallError("flistxattr", err)
		}
		for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
			if name == "" {
				continue
			}
			v, err := sized(func(b []byte) (int, error) { return unix.Fgetxattr(int(fd), name, b) })
			if errors.Is(err, unix.ENODATA) { // removed since
				continue
			}
			if err != nil {
				return os.NewSyscallError("fgetxattr "+name, err)
			}
			attrs[name] = v
		}
		return nil
	})
	return attrs, err
}

// sized asks a call for its size and then for its bytes, again when they grew
// in between.
func sized(call func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := call(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		b := make([]byte, n)
		n, err = call(b)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return b[:n], nil
	}
}

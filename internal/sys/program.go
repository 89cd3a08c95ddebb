package sys

import (
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Program is where this process has the code mapped that it runs: not the rest of the
// file, of which a linker may have written what can only be read afterwards.
type Program struct{ parts [][]byte }

// OwnProgram finds it, while there is a /proc.
func OwnProgram() (Program, error) {
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return Program{}, err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return Program{}, err
	}
	var p Program
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		if len(f) < 6 || strings.Join(f[5:], " ") != path || f[1] != "r-xp" {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); err != nil {
			return Program{}, fmt.Errorf("mapping %q: %w", f[0], err)
		}
		p.parts = append(p.parts, unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(nil), from)), to-from))
	}
	return p, nil
}

// Unload lets go of the pages that the process has seen of it: they come back from the
// page cache when they are needed.
func (p Program) Unload() error {
	for _, part := range p.parts {
		if err := unix.Madvise(part, unix.MADV_DONTNEED); err != nil {
			return os.NewSyscallError("madvise", err)
		}
	}
	return nil
}

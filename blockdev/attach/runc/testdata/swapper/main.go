// The swapper changes names inside a container as fast as it can: directories for
// symbolic links that lead elsewhere, parents for other parents, and back.
package main

import (
	"math/rand/v2"
	"os"
	"syscall"
	"unsafe"
)

const exchange = 2 // RENAME_EXCHANGE

func rename(a, b string, flags uintptr) {
	pa, _ := syscall.BytePtrFromString(a)
	pb, _ := syscall.BytePtrFromString(b)
	at := ^uintptr(99) // AT_FDCWD, -100
	_, _, _ = syscall.Syscall6(sysRenameat2, at, uintptr(unsafe.Pointer(pa)), at, uintptr(unsafe.Pointer(pb)), flags, 0)
}

func isLink(name string) bool {
	info, err := os.Lstat(name)
	return err == nil && info.Mode()&os.ModeSymlink != 0
}

func main() {
	for _, dir := range []string{"/a/data", "/b/data", "/target", "/spare"} {
		_ = os.MkdirAll(dir, 0o755)
	}
	links := []string{"/target", "..", "/", "/proc/1/root", "/etc", "../../../../../.."}
	_ = os.Symlink(links[0], "/a/link")
	_ = os.Symlink(links[1], "/link")
	for {
		switch rand.IntN(9) {
		case 0, 1, 2:
			rename("/a/data", "/a/link", exchange) // the mount path is a link, and is not
			rename("/a/data", "/a/link", exchange)
		case 3, 4:
			rename("/a", "/b", exchange) // another directory of this name
		case 5:
			rename("/a", "/link", exchange) // a directory above is a link, and is not
			rename("/a", "/link", exchange)
		case 6:
			rename("/a/data", "/spare/data", 0) // it is somewhere else
			rename("/spare/data", "/a/data", 0)
		case 7:
			_ = syscall.Rmdir("/a/data")
			_ = os.Mkdir("/a/data", 0o755)
		case 8:
			_ = os.Remove("/a/link")
			_ = os.Symlink(links[rand.IntN(len(links))], "/a/link")
		}
		// What is a mount point cannot be renamed: the way back may have failed.
		if isLink("/a") {
			rename("/a", "/link", exchange)
		}
		if isLink("/a/data") {
			rename("/a/data", "/a/link", exchange)
		}
	}
}

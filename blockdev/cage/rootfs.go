package cage

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/blockdev/filesystem"
	"holdfast/internal/run"
)

// rootfs is the root of all cages: empty directories and files on which mounts
// are made, and links as the host has them.
type rootfs struct {
	dir   string
	shown []string // the host's directories that are shown, read-only, at the same path
}

// programs and their libraries, where distributions have them: all below /usr
// today; older ones have real directories beside it.
var (
	usrDirs   = []string{"/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32"}
	localDirs = []string{"/usr/local/bin", "/usr/local/sbin", "/usr/local/lib"} // where a tool is found there
	rootDirs  = []string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}
)

// insideName is our own program.
const insideName = "inside"

func makeRoot(dir string) (rootfs, error) {
	r := rootfs{dir: dir}
	usr := usrDirs
	if toolsBelow("/usr/local/") {
		usr = append(slices.Clone(usr), localDirs...)
	}
	for _, d := range usr {
		if info, err := os.Lstat(d); err == nil && info.IsDir() {
			r.shown = append(r.shown, d)
		}
	}
	links := map[string]string{}
	for _, d := range rootDirs {
		info, err := os.Lstat(d)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return r, err
		case info.IsDir():
			r.shown = append(r.shown, d)
		default:
			if links[d], err = os.Readlink(d); err != nil {
				return r, err
			}
		}
	}
	dirs := append([]string{"/dev", "/proc/self", "/etc", "/" + deviceDir}, r.shown...)
	// What tools ask for what is mounted: nothing is.
	files := []string{"/etc/mtab", "/proc/mounts", "/proc/self/mounts", "/" + imageName, "/" + insideName}
	// runc comes down to the root as the cage's root, who is nobody here.
	if err := makeDir(filepath.Dir(dir), 0o711); err != nil {
		return r, err
	}
	if err := makeDir(dir, 0o755); err != nil {
		return r, err
	}
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil { //nolint:gosec // everybody may see that it is empty
			return r, err
		}
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o644); err != nil { //nolint:gosec // likewise
			return r, err
		}
	}
	for name, text := range links {
		if err := os.Symlink(text, filepath.Join(dir, name)); err != nil {
			return r, err
		}
	}
	// The process's umask cuts modes.
	return r, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(path, 0o755) //nolint:gosec // likewise
		} else if err == nil && d.Type().IsRegular() {
			err = os.Chmod(path, 0o644) //nolint:gosec // likewise
		}
		return err
	})
}

func toolsBelow(dir string) bool {
	for _, t := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		for _, name := range t.Programs() {
			if program, err := run.Look(name); err == nil && strings.HasPrefix(program, dir) {
				return true
			}
		}
	}
	return false
}

func makeDir(dir string, mode fs.FileMode) error {
	if err := os.MkdirAll(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}

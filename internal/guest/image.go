package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/internal/run"
)

// image is what a guest is started from: kernel, initramfs and root filesystem in
// one directory, which gets its name when all is in it.
type image struct{ dir string }

func (i image) file(name string) string { return filepath.Join(i.dir, name) }

const (
	initSource  = "internal/guest/init"
	imageFormat = "1" // changes when images are to be made otherwise
	buildTime   = 10 * time.Minute
)

// repository finds the project's directory, around where this process runs or where
// its program lies: the guest's first process is built from its sources.
func repository() (string, error) {
	here, err := os.Getwd()
	if err != nil {
		return "", err
	}
	program, err := os.Executable()
	if err != nil {
		return "", err
	}
	for _, dir := range []string{here, filepath.Dir(program)} {
		for d := dir; ; d = filepath.Dir(d) {
			if _, err := os.Stat(filepath.Join(d, initSource, "main.go")); err == nil {
				return d, nil
			}
			if d == filepath.Dir(d) {
				break
			}
		}
	}
	return "", fmt.Errorf("neither %s nor %s is in a clone of the project, which guests are made from", here, program)
}

// Files are what a guest is started from.
type Files struct {
	Kernel, Initrd string
	Root           string // squashfs
	CommandLine    string // "guest_root=vda1" beside it: the node of the root
}

// Parts gives those for what this host has now, made if they are not in the cache: for a
// disk that Options.Firmware boots.
func Parts(ctx context.Context) (Files, error) {
	ctx, cancel := context.WithTimeout(ctx, buildTime)
	defer cancel()
	i, err := theImage(ctx)
	return Files{i.file("vmlinuz"), i.file("initrd"), i.file("root"), cmdline}, err
}

// theImage gives the image for what this host has now; it is made if it is not in
// the cache. Several test processes may ask at once; one asks once.
func theImage(ctx context.Context) (image, error) {
	asked.Lock()
	defer asked.Unlock()
	if asked.image.dir != "" {
		return asked.image, nil
	}
	i, err := findImage(ctx)
	if err == nil {
		asked.image = i
	}
	return i, err
}

var asked struct {
	sync.Mutex
	image image
}

func findImage(ctx context.Context) (image, error) {
	root, err := repository()
	if err != nil {
		return image{}, err
	}
	cache := filepath.Join(root, ".cache", "vm")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return image{}, err
	}
	lock, err := lockFile(filepath.Join(cache, "lock"))
	if err != nil {
		return image{}, err
	}
	defer lock.Close()
	k, err := fetchKernel(ctx, cache)
	if err != nil {
		return image{}, err
	}
	fresh, err := os.MkdirTemp(cache, "image-")
	if err != nil {
		return image{}, err
	}
	defer os.RemoveAll(fresh)
	init := filepath.Join(fresh, "init")
	if err := buildInit(ctx, root, init); err != nil {
		return image{}, err
	}
	name, err := digest(k, init)
	if err != nil {
		return image{}, err
	}
	i := image{filepath.Join(cache, name)}
	if err := os.Chtimes(i.dir, time.Time{}, time.Now()); err == nil { // it is in use: see dropOld
		return i, nil
	}
	if err := build(ctx, k, fresh, init); err != nil {
		return i, fmt.Errorf("build the guest's image: %w", err)
	}
	dropOld(cache)
	return i, os.Rename(fresh, i.dir)
}

const (
	// keepImages is how many images stay in the cache.
	keepImages = 3
	// inUse is how long after somebody has asked for it an image stays in any case:
	// whoever did may be about to start guests from it.
	inUse = time.Hour
)

// dropOld removes the images that nobody has asked for for the longest time.
func dropOld(cache string) {
	dirs, _ := filepath.Glob(filepath.Join(cache, "guest-*"))
	slices.SortFunc(dirs, func(a, b string) int { return modified(b).Compare(modified(a)) })
	for _, dir := range dirs[min(len(dirs), keepImages-1):] {
		if time.Since(modified(dir)) > inUse {
			_ = os.RemoveAll(dir)
		}
	}
}

func modified(path string) time.Time {
	info, err := os.Stat(path)
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

func buildInit(ctx context.Context, root, to string) error {
	_, err := run.Run(ctx, run.Cmd{
		Args: []string{"go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", to, "./" + initSource},
		Dir:  root, Env: append(os.Environ(), "CGO_ENABLED=0"), Timeout: buildTime,
	})
	return err
}

// digest names an image by everything that it is made of.
func digest(k kernel, init string) (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, imageFormat, k.release, lvmConf, earlyModules, guestModules, aliases, lvmNames, thinNames)
	b, err := os.ReadFile(init)
	if err != nil {
		return "", err
	}
	sum.Write(b)
	for _, name := range append(slices.Clone(guestPrograms), "busybox") {
		path, err := run.Look(name)
		if err != nil {
			return "", fmt.Errorf("%w (the guest's programs are this host's: .ci/setup all)", err)
		}
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(sum, path, info.Size(), info.ModTime().UnixNano())
	}
	return "guest-" + hex.EncodeToString(sum.Sum(nil)[:8]), nil
}

func build(ctx context.Context, k kernel, dir, init string) error {
	early, err := k.needs(ctx, earlyModules)
	if err != nil {
		return err
	}
	late, err := k.needs(ctx, guestModules)
	if err != nil {
		return err
	}
	return errors.Join(
		linkOrCopy(k.image(), filepath.Join(dir, "vmlinuz")),
		writeInitramfs(k, filepath.Join(dir, "initrd"), init, early),
		writeRoot(ctx, k, dir, init, append(early, late...)))
}

func linkOrCopy(from, to string) error {
	if os.Link(from, to) == nil {
		return nil
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}

func writeInitramfs(k kernel, to, init string, modules []string) error {
	var b bytes.Buffer
	c := cpioWriter{w: &b}
	for _, d := range []string{"dev", "proc", "sys", "modules"} {
		c.add(d, cpioDir|0o755, nil)
	}
	c.entry("dev/console", cpioNode|0o600, 5, 1, nil)
	program, err := os.ReadFile(init)
	if err != nil {
		return err
	}
	c.add("init", cpioFile|0o755, program)
	var list strings.Builder
	for n, file := range modules {
		data, err := os.ReadFile(filepath.Join(k.dir, file))
		if err != nil {
			return err
		}
		name := fmt.Sprintf("modules/%02d-%s", n, filepath.Base(file))
		fmt.Fprintln(&list, "/"+name)
		c.add(name, cpioFile|0o644, data)
	}
	c.add("modules.list", cpioFile|0o644, []byte(list.String()))
	if err := c.close(); err != nil {
		return err
	}
	return os.WriteFile(to, b.Bytes(), 0o644)
}

func writeRoot(ctx context.Context, k kernel, dir, init string, modules []string) error {
	at := filepath.Join(dir, "tree")
	defer os.RemoveAll(at)
	t, err := newTree(at)
	if err != nil {
		return err
	}
	if err := t.fill(init); err != nil {
		return err
	}
	if err := t.modules(ctx, k, modules); err != nil {
		return err
	}
	_, err = run.Run(ctx, run.Cmd{
		Args:    []string{"mksquashfs", at, filepath.Join(dir, "root"), "-comp", "lz4", "-noappend", "-quiet", "-no-progress", "-all-root", "-all-time", "0", "-mkfs-time", "0", "-no-exports"},
		Timeout: buildTime,
	})
	return err
}

// modules adds kernel modules and their index.
func (t *tree) modules(ctx context.Context, k kernel, files []string) error {
	for _, file := range files {
		if err := t.copy(filepath.Join(k.dir, file), "/usr/"+file); err != nil {
			return err
		}
	}
	for _, name := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		err := t.copy(filepath.Join(k.dir, k.modules(), name), "/usr/"+filepath.Join(k.modules(), name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	_, err := run.Run(ctx, run.Cmd{Args: []string{"depmod", "-b", t.dir, k.release}})
	return err
}

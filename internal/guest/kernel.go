package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"holdfast/internal/run"
)

// kernel is an unpacked package of the distribution's cloud kernel: small, quick
// to boot, with device mapper and virtio as modules. It is never installed.
type kernel struct {
	dir     string // as dpkg unpacked it
	release string // "6.1.0-56-cloud-amd64"
}

// kernelMeta is the package that depends on the newest one.
const kernelMeta = "linux-image-cloud-amd64"

const fetchTime = 5 * time.Minute

// fetchKernel gets the package from the distribution's mirror, unless it is in the
// cache already, and unpacks it.
func fetchKernel(ctx context.Context, cache string) (kernel, error) {
	name, err := kernelPackage(ctx, cache)
	if err != nil {
		return kernel{}, err
	}
	k := kernelOf(cache, name)
	if _, err := os.Stat(k.image()); err == nil {
		return k, nil
	}
	fresh, err := os.MkdirTemp(cache, "kernel-")
	if err != nil {
		return k, err
	}
	defer os.RemoveAll(fresh)
	if err := download(ctx, name, fresh); err != nil {
		// The lists may be older than the mirror, which has only the newest kernel.
		if update := updateLists(ctx); update != nil {
			return k, errors.Join(err, update)
		}
		if name, err = askKernelPackage(ctx); err != nil {
			return k, err
		}
		if err := download(ctx, name, fresh); err != nil {
			return k, err
		}
		k = kernelOf(cache, name)
	}
	packages, err := filepath.Glob(filepath.Join(fresh, "*.deb"))
	if err != nil || len(packages) != 1 {
		return k, fmt.Errorf("fetch the guest's kernel: %d packages came", len(packages))
	}
	root := filepath.Join(fresh, "root")
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"dpkg-deb", "-x", packages[0], root}, Timeout: fetchTime}); err != nil {
		return k, err
	}
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"depmod", "-b", root, k.release}, Timeout: fetchTime}); err != nil {
		return k, err
	}
	if err := os.Rename(root, k.dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return k, err
	}
	return k, nil
}

func kernelOf(cache, name string) kernel {
	return kernel{dir: filepath.Join(cache, name), release: strings.TrimPrefix(name, "linux-image-")}
}

// download fetches a package into a directory.
func download(ctx context.Context, name, dir string) error {
	_, err := run.Run(ctx, run.Cmd{Args: []string{"apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", name}, Dir: dir, Timeout: fetchTime})
	if err != nil {
		return fmt.Errorf("fetch the guest's kernel: %w", err)
	}
	return nil
}

func updateLists(ctx context.Context) error {
	_, err := run.Run(ctx, run.Cmd{Args: []string{"apt-get", "update", "-q", "-o", "Acquire::Retries=3"}, Timeout: fetchTime})
	return err
}

var kernelName = regexp.MustCompile(`(?m)^\s*Depends: (linux-image-[0-9][0-9a-z.+-]*)$`)

// kernelPackage tells the newest kernel's package. Without lists of packages it is
// one that was unpacked before, or else the lists are fetched.
func kernelPackage(ctx context.Context, cache string) (string, error) {
	name, err := askKernelPackage(ctx)
	if err == nil {
		return name, nil
	}
	if have, _ := filepath.Glob(filepath.Join(cache, "linux-image-*")); len(have) > 0 {
		return filepath.Base(slices.Max(have)), nil
	}
	if fetch := updateLists(ctx); fetch != nil {
		return "", errors.Join(err, fetch)
	}
	return askKernelPackage(ctx)
}

func askKernelPackage(ctx context.Context) (string, error) {
	r, err := run.Run(ctx, run.Cmd{Args: []string{"apt-cache", "depends", kernelMeta}})
	if err != nil {
		return "", err
	}
	found := kernelName.FindSubmatch(r.Stdout)
	if found == nil {
		return "", fmt.Errorf("%s depends on no kernel in apt's lists", kernelMeta)
	}
	return string(found[1]), nil
}

func (k kernel) image() string   { return filepath.Join(k.dir, "boot", "vmlinuz-"+k.release) }
func (k kernel) modules() string { return filepath.Join("lib", "modules", k.release) }

// earlyModules make the root filesystem and the agent's port usable.
var earlyModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "squashfs", "overlay"}

// guestModules are loaded by whoever uses the guest, or by what they run.
var guestModules = []string{
	"virtio_scsi", "sd_mod", "xfs", "btrfs", "ext4", "loop", "nbd", "fuse", "dm-mod", "dm-thin-pool", "dm-snapshot", "dm-flakey", "dm-log-writes", "dm-delay", "dm-zero", "dm-crypt",
	"crc32c_generic", "crc32c-intel", "null_blk", "brd", "scsi_debug", "vmw_vsock_virtio_transport", "acpiphp", "shpchp", "pciehp",
}

// needs gives the files of modules and of what they depend on, in the order in
// which they load, relative to the kernel's directory. Names that are built in,
// or that this kernel does not have, have none.
func (k kernel) needs(ctx context.Context, names []string) ([]string, error) {
	var files []string
	for _, name := range names {
		r, err := run.Run(ctx, run.Cmd{Args: []string{"modprobe", "-d", k.dir, "-S", k.release, "--show-depends", name}, OKCodes: []int{1}})
		if err != nil {
			return nil, err
		}
		for _, text := range strings.Split(string(r.Stdout), "\n") {
			words := strings.Fields(text)
			if len(words) < 2 || words[0] != "insmod" {
				continue
			}
			file, err := filepath.Rel(k.dir, words[1])
			if err != nil {
				return nil, err
			}
			if !slices.Contains(files, file) {
				files = append(files, file)
			}
		}
	}
	return files, nil
}

package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"holdfast/internal/run"
)

// box is a container that does nothing.
type box struct {
	id   string
	root string // runc's state directory
	pid  int    // of its first process
}

// see is a path inside, as this process can open it.
func (b *box) see(path string) string { return "/proc/" + strconv.Itoa(b.pid) + "/root" + path }

// startBox starts one with a busybox root filesystem.
func startBox(ctx context.Context, dir, root, id string) (*box, error) {
	bundle := filepath.Join(dir, id)
	if err := makeBundle(ctx, bundle); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(bundle, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	pidFile := filepath.Join(bundle, "pid")
	_, err = run.Run(ctx, run.Cmd{Args: []string{"runc", "--root", root, "run", "--detach", "--pid-file", pidFile, "--bundle", bundle, id}, Stdout: log, Stderr: log})
	if err != nil {
		return nil, fmt.Errorf("%w, see %s", err, log.Name())
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	return &box{id: id, root: root, pid: pid}, err
}

func makeBundle(ctx context.Context, bundle string) error {
	for _, dir := range []string{"bin", "proc", "dev", "sys", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(bundle, "rootfs", dir), 0o755); err != nil {
			return err
		}
	}
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("%w: install busybox-static", err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "rootfs/bin/busybox"), program, 0o755); err != nil { //nolint:gosec // a program
		return err
	}
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"runc", "spec"}, Dir: bundle}); err != nil {
		return err
	}
	config := filepath.Join(bundle, "config.json")
	text, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	var spec specs.Spec
	if err := json.Unmarshal(text, &spec); err != nil {
		return err
	}
	spec.Process.Terminal, spec.Process.Args, spec.Root.Readonly = false, []string{"/bin/busybox", "sleep", "100000"}, false
	if text, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(config, text, 0o600)
}

// mountLoop is what one would do by hand: mount -o loop of an image and the first
// byte, then umount, which flushes into the page cache of the pool's filesystem.
func (y *yardsticks) mountLoop(ctx context.Context, dirty int, mount, unmount *samples) error {
	at := filepath.Join(y.dir, "mnt")
	if err := os.MkdirAll(at, 0o700); err != nil {
		return err
	}
	err := mount.time(func() error {
		if _, err := run.Run(ctx, run.Cmd{Args: []string{"mount", "-o", "loop", y.image, at}}); err != nil {
			return err
		}
		f, err := os.Open(at)
		if err != nil {
			return err
		}
		_, err = f.Readdirnames(1)
		return errors.Join(err, f.Close())
	})
	if err != nil {
		return err
	}
	if err := writeDirty(at, dirty); err != nil {
		return err
	}
	return unmount.time(func() error {
		_, err := run.Run(ctx, run.Cmd{Args: []string{"umount", at}})
		return err
	})
}

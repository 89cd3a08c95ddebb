package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"holdfast/internal/run"
)

func (s *show) runcRoot() string     { return filepath.Join(s.dir, "runc") }
func (s *show) id(box string) string { return "holdfast-" + box }
func (s *show) runc(a ...string) run.Cmd {
	return run.Cmd{Args: append([]string{"runc", "--root", s.runcRoot()}, a...)}
}

// container starts a small busybox container with no volume: it gets its
// volumes while it runs.
func (s *show) container(ctx context.Context, box string) error {
	bundle := filepath.Join(s.dir, box)
	if err := makeBundle(ctx, bundle); err != nil {
		return err
	}
	s.containers = append(s.containers, box)
	return s.timed("runc run -d "+box, func() error {
		log, err := os.Create(filepath.Join(s.dir, box+".log"))
		if err != nil {
			return err
		}
		defer log.Close()
		c := s.runc("run", "--detach", "--bundle", bundle, s.id(box))
		c.Stdout, c.Stderr = log, log // files: the container keeps them open
		if _, err := run.Run(ctx, c); err != nil {
			return fmt.Errorf("%w, see %s", err, log.Name())
		}
		return nil
	})
}

func makeBundle(ctx context.Context, bundle string) error {
	root := filepath.Join(bundle, "rootfs")
	for _, dir := range []string{"bin", "proc", "dev", "sys", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("%w: install busybox-static", err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), busybox, 0o755); err != nil {
		return err
	}
	for _, applet := range []string{"sh", "sleep", "ls", "find", "wc", "cat", "df", "tail", "sync", "echo"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			return err
		}
	}
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"runc", "spec"}, Dir: bundle}); err != nil {
		return err
	}
	return adjustSpec(filepath.Join(bundle, "config.json"))
}

// adjustSpec makes runc's default container one that waits and needs no terminal.
func adjustSpec(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		return err
	}
	spec.Process.Terminal = false
	spec.Process.Args = []string{"/bin/sleep", "3600"}
	spec.Root.Readonly = false
	if b, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

func (s *show) exec(ctx context.Context, box, script string) (string, error) {
	result, err := run.Run(ctx, s.runc("exec", s.id(box), "/bin/sh", "-c", script))
	return string(result.Stdout), err
}

// destroy kills a container and removes it; one that is gone is success.
func (s *show) destroy(ctx context.Context, box string) error {
	for i, b := range s.containers {
		if b == box {
			s.containers = append(s.containers[:i:i], s.containers[i+1:]...)
			_, err := run.Run(ctx, s.runc("delete", "--force", s.id(box)))
			return err
		}
	}
	return nil
}

package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"holdfast/internal/guest/agent"
	"holdfast/internal/run"
)

// Install puts a program of this host that the image does not have into the running
// guest, at its own path and with the libraries that it needs. Libraries that the guest
// has already are replaced by the same ones: start nothing meanwhile. run.ErrNotFound:
// this host does not have the program.
func (v *VM) Install(ctx context.Context, name string) (err error) {
	dir, err := os.MkdirTemp("", "install.")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	t, err := newTree(filepath.Join(dir, "tree"))
	if err != nil {
		return err
	}
	if err := t.program(name); err != nil {
		return err
	}
	archive := filepath.Join(dir, "tar")
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"tar", "-C", t.dir, "-cf", archive, "usr"}}); err != nil {
		return err
	}
	in, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer in.Close()
	return v.Command(ctx, agent.Command{Args: []string{"tar", "-C", "/", "-xf", "-"}}, in, nil, nil)
}

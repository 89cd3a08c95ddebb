package daemon

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"holdfast/blockdev/attach"
	"holdfast/blockdev/sparse"
	"holdfast/internal/sandbox"
)

// Uninstall takes away the mounts, loop devices and sandboxes that the daemon
// leaves for its successor. No file is removed. blockdev.ErrBusy while a volume is
// attached, also to a sandbox.
func Uninstall(ctx context.Context, c Config, errOut io.Writer) (err error) {
	log, err := newLog(c, errOut)
	if err != nil {
		return Usage(err)
	}
	if _, err := os.Stat(c.StateDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	n, err := claim(c, log, "uninstall")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	if err := n.removeCages(ctx); err != nil {
		return err
	}
	stage, err := attach.NewStage(n.at.stage())
	if err != nil {
		return err
	}
	if err := stage.Teardown(ctx); err != nil {
		return err
	}
	id, err := n.hostID()
	if err != nil {
		return err
	}
	if err := removeWorkers(ctx, id); err != nil {
		return err
	}
	if err := sandbox.Teardown(ctx, filepath.Join(c.SandboxRunDir, id)); err != nil {
		return err
	}
	if c.PoolDir != c.StateDir {
		err = sparse.Unprepare(ctx, c.PoolDir)
	}
	return errors.Join(err, sparse.Unprepare(ctx, c.StateDir))
}

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev/attach/qmp"
	"holdfast/internal/guest/agent"
)

// patience bounds one command in a guest that has no bound of its own.
const patience = 2 * time.Minute

// Open starts a guest from the saved state, which is made if there is none. Close
// ends it.
func Open(ctx context.Context, o Options) (*VM, error) {
	o = o.withDefaults()
	began := time.Now()
	building, done := context.WithTimeout(ctx, buildTime)
	defer done()
	i, err := theImage(building)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	v, err := begin(ctx, i, o)
	if err != nil {
		return nil, err
	}
	for n, size := range o.Disks {
		if err := v.blank(ctx, n, size); err != nil {
			return nil, errors.Join(err, v.Close())
		}
	}
	v.Started = time.Since(began)
	return v, nil
}

func begin(ctx context.Context, i image, o Options) (*VM, error) {
	if o.Boot || o.Firmware {
		return boot(ctx, i, o)
	}
	state, err := o.statePath(i)
	if err != nil {
		return nil, err
	}
	lock, err := lockFile(state + ".lock")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(state); err != nil {
		if err := saveState(ctx, i, o, state); err != nil {
			return nil, errors.Join(fmt.Errorf("save the guest's state: %w", err), lock.Close())
		}
	}
	if err := lock.Close(); err != nil {
		return nil, err
	}
	return restore(ctx, i, o, state)
}

// lockFile waits for a lock, which ends with the file or the process.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// blank plugs in an empty disk and waits until the guest has it.
func (v *VM) blank(ctx context.Context, n int, size int64) error {
	path := filepath.Join(v.Dir, fmt.Sprintf("disk%d.img", n))
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	serial := fmt.Sprintf("disk%d", n)
	if err := v.Plug(ctx, serial, path, n); err != nil {
		return err
	}
	_, err = v.Disk(ctx, serial)
	return err
}

// Plug attaches a file as a disk with a serial to a root port, bypassing what is
// tested. Nothing written to it is expected to outlive the host.
func (v *VM) Plug(ctx context.Context, serial, path string, port int) error {
	err := v.Do(ctx, "blockdev-add", qmp.Args{
		"driver": "raw", "node-name": serial, "discard": "unmap",
		"file": qmp.Args{"driver": "file", "filename": path, "discard": "unmap", "cache": qmp.Args{"no-flush": true}},
	})
	if err != nil {
		return err
	}
	return v.Do(ctx, "device_add", qmp.Args{"driver": "virtio-blk-pci", "id": serial, "drive": serial, "serial": serial, "bus": fmt.Sprintf("rp%d", port)})
}

// Unplug takes a disk that Plug attached away and waits until the guest has let it go.
func (v *VM) Unplug(ctx context.Context, serial string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	mark := v.control.Mark()
	if err := v.Do(ctx, "device_del", qmp.Args{"id": serial}); err != nil {
		return err
	}
	_, err := v.control.Wait(ctx, mark, func(e qmp.Event) bool {
		return e.Name == "DEVICE_DELETED" && strings.Contains(string(e.Data), `"`+serial+`"`)
	})
	if err != nil {
		return err
	}
	return v.Do(ctx, "blockdev-del", qmp.Args{"node-name": serial})
}

// Disk waits until the guest has a disk with a serial, and gives its node.
func (v *VM) Disk(ctx context.Context, serial string) (string, error) {
	return v.Output(ctx, "/init", "disk", serial)
}

// DiskOf waits until the guest has a disk with a serial and at least a size in bytes.
func (v *VM) DiskOf(ctx context.Context, serial string, size int64) (string, error) {
	return v.Output(ctx, "/init", "disk", serial, strconv.FormatInt(size/512, 10))
}

// Command runs a command in the guest with its input and output streams, which may
// be nil; only ctx bounds it. A failing one is an *agent.ExitError.
func (v *VM) Command(ctx context.Context, c agent.Command, in io.Reader, out, errs io.Writer) error {
	err := v.agent.Run(ctx, c, in, out, errs)
	if errors.Is(err, agent.ErrLost) || errors.Is(err, context.DeadlineExceeded) {
		err = v.last(ctx, err)
	}
	return err
}

// last adds the console's end to an error. A guest that is gone may be about to say
// why: its process has ended when all is said.
func (v *VM) last(ctx context.Context, err error) error {
	if errors.Is(err, agent.ErrLost) {
		select {
		case <-v.process.Done():
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return fmt.Errorf("%w\nthe guest's console ends:\n%s", err, v.Console())
}

// Run runs a command in the guest. A failing one is an *agent.ExitError with the
// end of its output.
func (v *VM) Run(ctx context.Context, args ...string) error {
	_, err := v.Output(ctx, args...)
	return err
}

// Output runs a command in the guest and gives its output without the final
// newline.
func (v *VM) Output(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var out bytes.Buffer
	err := v.Command(ctx, agent.Command{Args: args}, nil, &out, nil)
	return strings.TrimRight(out.String(), "\n"), err
}

package cage

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	gorunc "github.com/containerd/go-runc"

	"holdfast/internal/sys"
)

const (
	// endTime bounds the end of its processes after SIGKILL: one of them may be
	// in the kernel, writing to a slow disk.
	endTime = 30 * time.Second
	// deleteTime bounds "runc delete".
	deleteTime = 30 * time.Second
)

// cage is a container whose first process waits for commands.
type cage struct {
	id      string
	dir     string   // its bundle
	pid     int      // of its first process, here
	process *os.File // pidfd of the first process
	mounts  *os.File // its mount namespace
	users   *os.File // its user namespace
	socket  *os.File // to the first process
	oom     string   // file in which the kernel counts processes killed for memory; "": none
}

// start makes a cage and returns when its first process waits. No image is in it.
func (c *Cages) start(ctx context.Context, d device) (k *cage, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.StartTime)
	defer cancel()
	k = &cage{id: "holdfast-cage-" + c.o.Name + "-" + strings.ToLower(rand.Text()[:10])}
	k.dir = c.path(k.id)
	defer func() {
		if err != nil { // runc may have been killed half-way, and known of nothing yet
			err = errors.Join(fmt.Errorf("%w: %w", ErrUnavailable, err), c.end(k), removeGroups(k.id))
			k = nil
		}
	}()
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return k, err
	}
	if err := c.writeSpec(k, d); err != nil {
		return k, err
	}
	pid, err := c.create(ctx, k)
	if err != nil {
		return k, err
	}
	if err := k.hold(pid); err != nil {
		return k, err
	}
	if err := k.socket.SetReadDeadline(deadlineOf(ctx)); err != nil {
		return k, err
	}
	if err := k.greeted(); err != nil {
		return k, fmt.Errorf("the first process of the cage does not answer: %w", err)
	}
	// runc needs a /proc, the tools do not.
	err = sys.InMountNamespace(k.mounts, func(in sys.Inside) error { return in.UnmountAt(in.Root, "proc") })
	return k, err
}

func deadlineOf(ctx context.Context) time.Time {
	t, _ := ctx.Deadline()
	return t
}

// create runs runc, which returns when the first process has been started. A
// process that begins has all mounts of the namespace that it comes from, and holds
// them for some milliseconds: volumes and pools that are being let go meanwhile
// would stay. So it comes from a namespace that never had them.
func (c *Cages) create(ctx context.Context, k *cage) (pid int, err error) {
	ours, theirs, err := sys.SocketPair()
	if err != nil {
		return 0, err
	}
	k.socket = ours
	defer theirs.Close()
	null, err := gorunc.NewNullIO()
	if err != nil {
		return 0, err
	}
	defer null.Close()
	runc := c.runc
	runc.Log, runc.LogFormat = filepath.Join(k.dir, "log"), gorunc.JSON
	pidFile := filepath.Join(k.dir, "pid")
	err = sys.InMountNamespace(c.nursery, func(sys.Inside) error {
		_, err := runc.Run(ctx, k.id, k.dir, &gorunc.CreateOpts{
			IO: null, PidFile: pidFile, Detach: true, ExtraFiles: []*os.File{theirs},
		})
		return err
	})
	if err != nil {
		return 0, classify(ctx, "run", k, err)
	}
	return gorunc.ReadPidFile(pidFile)
}

// classify gives an error of go-runc a cause and runc's own words, which it has
// written to its log: go-runc tells the exit code alone.
func classify(ctx context.Context, call string, k *cage, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("runc %s: %w", call, context.Cause(ctx))
	}
	text, _ := os.ReadFile(filepath.Join(k.dir, "log")) // the exit code is told in any case
	var last struct{ Level, Msg string }
	for line := range strings.Lines(string(text)) {
		var entry struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Level == "error" {
			last = entry
		}
	}
	if last.Msg == "" {
		return fmt.Errorf("runc %s: %w", call, err)
	}
	return fmt.Errorf("runc %s: %w: %s", call, err, last.Msg)
}

// hold opens the first process and its namespaces. That they are its own is
// proven by its control group, which nobody else has, and its being alive after.
func (k *cage) hold(pid int) (err error) {
	k.pid = pid
	if k.process, err = sys.OpenPidfd(pid); err != nil {
		return err
	}
	if k.mounts, err = sys.MountNamespace(pid); err != nil {
		return err
	}
	if k.users, err = sys.UserNamespace(pid); err != nil {
		return err
	}
	groups, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return err
	}
	if !strings.Contains(string(groups), k.id) || !k.alive() {
		return fmt.Errorf("process %d is not the first of cage %s", pid, k.id)
	}
	k.oom = oomFile(string(groups))
	return nil
}

func (k *cage) alive() bool {
	alive, err := sys.PidfdAlive(k.process)
	return err == nil && alive
}

// quit kills all processes of the cage and returns when they have ended and the
// image is out of it: the first process ends after all others, and with it and
// our hold its mount namespace goes.
func (k *cage) quit() error {
	if k.socket != nil {
		defer k.socket.Close()
	}
	defer func() {
		for _, f := range []*os.File{k.users, k.mounts, k.process} {
			if f != nil {
				f.Close()
			}
		}
	}()
	if k.process == nil {
		return nil
	}
	if err := sys.KillProcess(k.process); err != nil {
		return fmt.Errorf("cage %s: %w", k.id, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), endTime)
	defer cancel()
	if err := sys.AwaitEnd(ctx, k.process); err != nil {
		return fmt.Errorf("cage %s does not end: %w", k.id, err)
	}
	return nil
}

// end is quit and the removal of everything else that belongs to the cage.
func (c *Cages) end(k *cage) error { return errors.Join(k.quit(), c.forget(k)) }

// forget makes runc forget a cage whose processes have ended.
func (c *Cages) forget(k *cage) error {
	ctx, cancel := context.WithTimeout(context.Background(), deleteTime)
	defer cancel()
	runc := c.runc
	if err := deleteContainer(ctx, &runc, k.id); err != nil {
		return err
	}
	return os.RemoveAll(k.dir)
}

// deleteContainer removes a container, its processes and its control groups; it
// is not there is success.
func deleteContainer(ctx context.Context, runc *gorunc.Runc, id string) error {
	if _, err := os.Stat(filepath.Join(runc.Root, id)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := runc.Delete(ctx, id, &gorunc.DeleteOpts{Force: true})
	if err != nil && !strings.Contains(err.Error(), "does not exist") {
		return fmt.Errorf("runc delete %s: %w", id, err)
	}
	return nil
}

package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// Serve gives the worker of an image. One that runs and serves it in the same way is
// found (its limits, rates and layers are what they are), one that serves it in
// another way is blockdev.ErrBusy; otherwise a worker is started. On return its
// socket can be connected to.
func (s *Starter) Serve(ctx context.Context, spec Spec) (*Worker, error) {
	w, err := s.serve(ctx, spec)
	return w, blockdev.Op("control.Serve", spec.ID, err)
}

func (s *Starter) serve(ctx context.Context, spec Spec) (*Worker, error) {
	w, err := s.find(ctx, spec.ID, string(spec.ID))
	switch {
	case err == nil && w.Kind() == spec.Kind && w.ReadOnly() == spec.ReadOnly:
		return w, nil
	case err == nil:
		return nil, fmt.Errorf("%w: it is served as %s, read-only %t", blockdev.ErrBusy, w.Kind(), w.ReadOnly())
	case !errors.Is(err, blockdev.ErrNotFound):
		return nil, err
	}
	if err := spec.check(); err != nil {
		return nil, err
	}
	return s.begin(ctx, spec, string(spec.ID))
}

// begin starts a worker that has its files in a directory of this name.
func (s *Starter) begin(ctx context.Context, spec Spec, home string) (*Worker, error) {
	if err := s.clear(ctx, home); err != nil {
		return nil, err
	}
	if err := s.start(ctx, spec, home); err != nil {
		return nil, errors.Join(err, s.clear(context.WithoutCancel(ctx), home))
	}
	return s.find(ctx, spec.ID, home)
}

// clear takes away what a worker that has ended has left, but for the ways to those that
// refuse, as long as they run.
func (s *Starter) clear(ctx context.Context, home string) error {
	entries, err := os.ReadDir(filepath.Join(s.o.Dir, home))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	kept := false
	for _, e := range entries {
		at := s.path(home, e.Name())
		if e.Type() == fs.ModeSymlink {
			refuses, err := s.refuses(ctx, at)
			errs = append(errs, err)
			if kept = kept || refuses || err != nil; refuses || err != nil {
				continue
			}
		}
		errs = append(errs, os.RemoveAll(at))
	}
	if !kept {
		errs = append(errs, os.RemoveAll(filepath.Join(s.o.Dir, home)))
	}
	return errors.Join(append(errs, s.groups(home).remove(ctx))...)
}

// start starts a process, hands it the volume and returns when it serves.
func (s *Starter) start(ctx context.Context, spec Spec, home string) (err error) {
	volume, files := spec.words()
	volume.DieWithParent = s.o.DieWithParent
	own, err := s.prepare(spec, volume, home)
	defer wire.CloseAll(own)
	if err != nil {
		return err
	}
	ours, theirs, err := sys.SocketPacketPair()
	if err != nil {
		return err
	}
	defer ours.Close()
	child, err := run.StartDetached(run.Detached{
		Args: []string{s.o.Program}, Files: []*os.File{theirs}, Stderr: s.o.Log,
		Cloneflags: namespaces(spec), DieWithParent: s.o.DieWithParent,
	})
	theirs.Close()
	if err != nil {
		return err
	}
	go reap(child)
	defer func() {
		if err != nil {
			err = errors.Join(err, abandon(child))
		}
	}()
	// Before it has anything to do, so that all it ever does counts there.
	if err := s.groups(home).hold(child.Pid(), spec.Kind, s.o.Memory); err != nil {
		return err
	}
	if err := s.note(home, child.Pid()); err != nil {
		return err
	}
	return s.open(ctx, ours, volume, append(own, files...))
}

// open makes the first call.
func (s *Starter) open(ctx context.Context, socket *os.File, volume *wire.Volume, files []*os.File) error {
	conn, err := net.FileConn(socket)
	if err != nil {
		return err
	}
	c := wire.Conn{UnixConn: conn.(*net.UnixConn)} //nolint:forcetypeassert // one end of a pair
	defer c.Close()
	_, err = talkWithin(ctx, c, &wire.Request{Op: wire.Open, Volume: volume}, nil, files)
	if errors.Is(err, errEnded) { // not that the image is not there
		return fmt.Errorf("the worker ended before it served: %s", err.Error())
	}
	return err
}

// namespaces are what a worker does not share with the daemon: the network, but for
// a base that is far away, and System V's objects. Mounts are shared: a copy of them
// would keep each volume and pool that was mounted at this moment from going.
func namespaces(spec Spec) uintptr {
	if spec.Remote != nil {
		return syscall.CLONE_NEWIPC
	}
	return syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET
}

// reap takes the exit status of a worker that ends while we live.
func reap(child *run.Child) {
	_ = sys.AwaitEnd(context.Background(), child.Pidfd()) // fails only with the descriptor
	_ = child.Wait()                                      // how it ended is seen at its sockets
}

// abandon ends a worker that could not begin. It has written nothing.
func abandon(child *run.Child) error {
	pidfd, err := sys.OpenPidfd(child.Pid())
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pidfd.Close()
	return errors.Join(sys.KillProcess(pidfd), sys.AwaitEnd(context.Background(), pidfd))
}

// check tells early what no worker can serve.
func (spec Spec) check() error {
	v, files := spec.words()
	v.User, v.Group = 1, 1
	switch {
	case spec.Remote != nil && spec.Remote.Chunks == nil || len(files) != v.Files()-wire.SocketFiles:
		return fmt.Errorf("%w: a file is missing", blockdev.ErrInvalid)
	case v.Check() != nil:
		return fmt.Errorf("%w: %w", blockdev.ErrInvalid, v.Check())
	}
	return nil
}

// words puts a volume into words, with its files in their order.
func (spec Spec) words() (*wire.Volume, []*os.File) {
	v := &wire.Volume{
		ID: spec.ID, Kind: spec.Kind, ReadOnly: spec.ReadOnly, Size: spec.Size, Queues: spec.Queues, Limits: spec.Limits,
		Trace: spec.Trace[:min(len(spec.Trace), wire.MaxTrace)], HydrateRate: spec.HydrateRate, Hydrate: spec.Hydrate,
		Flat: spec.Flat != nil, Layers: len(spec.Layers), Base: spec.Base != nil, BaseSize: spec.BaseSize,
		Remote: spec.Remote != nil, Lock: spec.Lock != nil, Refuse: spec.refuse,
	}
	var files []*os.File
	add := func(some ...*os.File) {
		for _, f := range some {
			if f != nil {
				files = append(files, f)
			}
		}
	}
	add(spec.Flat)
	for _, l := range spec.Layers {
		add(l.Data, l.Map)
	}
	add(spec.Base)
	if spec.Remote != nil {
		v.URL, v.Prefixes = spec.Remote.URL, spec.Remote.Prefixes
		add(spec.Remote.Chunks)
	}
	add(spec.Lock)
	return v, files
}

// prepare makes a worker's directory and sockets, and chooses its user.
func (s *Starter) prepare(spec Spec, v *wire.Volume, home string) (files []*os.File, err error) {
	if !openingForm.MatchString(spec.Opening) {
		return nil, fmt.Errorf("%w: opening %q", blockdev.ErrInvalid, spec.Opening)
	}
	s.choosing.Lock() // a user is taken once its socket is there
	defer s.choosing.Unlock()
	if v.User, v.Group, err = s.user(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.path(home, emptyRoot), 0o711); err != nil { //nolint:gosec // as New says
		return nil, err
	}
	for _, one := range []struct {
		name string
		kind int
	}{{controlSocket, syscall.SOCK_SEQPACKET}, {dataSocket(spec.Opening), syscall.SOCK_STREAM}} {
		f, err := sys.BindSocket(s.path(home, one.name), one.kind)
		if err != nil {
			return files, err
		}
		files = append(files, f)
		if err := os.Chmod(s.path(home, one.name), 0o600); err != nil {
			return files, err
		}
	}
	if err := os.Lchown(s.path(home, controlSocket), v.User, v.Group); err != nil {
		return files, err
	}
	root, err := os.Open(s.path(home, emptyRoot))
	if err != nil {
		return files, err
	}
	return append(files, root), nil
}

// user gives one that no worker has, while there is one. A worker's control socket
// belongs to its user, who is not let in there.
func (s *Starter) user() (user, group int, err error) {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return 0, 0, err
	}
	taken := map[int]bool{}
	for _, e := range entries {
		info, err := os.Lstat(filepath.Join(s.o.Dir, e.Name(), controlSocket))
		if err != nil {
			continue // it has none, or it went
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			taken[int(st.Uid)-s.o.User] = true
		}
	}
	for n := range s.o.Users {
		if !taken[n] {
			return s.o.User + n, s.o.Group + n, nil
		}
	}
	last := s.o.Users - 1
	return s.o.User + last, s.o.Group + last, nil
}

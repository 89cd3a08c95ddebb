package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control/wire"
)

// refusePrefix begins the names of the directories of workers that refuse; the opening
// whose clients they take follows.
const refusePrefix = "refuse-"

// comeTime bounds the wait for a virtual machine that connects again: QEMU tries once a
// second.
const comeTime = 3 * time.Second

// Refusal is a vhost-user opening that ends under the hands of a virtual machine.
type Refusal struct {
	ID       blockdev.ID
	Opening  string // as in its Spec
	ReadOnly bool
	Size     int64 // bytes
}

// home names the directory of the process that refuses.
func (r Refusal) home() string { return refusePrefix + r.Opening }

// Refuse readies a process without an image for who has an opening now, which may go on
// meanwhile; Lead then puts it in the place of its worker. Of a virtual
// machine that connects there again every request fails, while one whose
// connection is never made again waits for ever, and cannot give the disk back. The process
// ends when the virtual machine has hung up and does not come again within 20 s, or after an hour if it never came.
func (s *Starter) Refuse(ctx context.Context, r Refusal) error {
	return blockdev.Op("control.Refuse", r.ID, s.refuse(ctx, r))
}

func (s *Starter) refuse(ctx context.Context, r Refusal) error {
	if r.Opening == "" {
		return fmt.Errorf("%w: an opening without a name", blockdev.ErrInvalid)
	}
	owner := s.owner(r) // of the worker's socket, which goes with it
	w, err := s.find(ctx, r.ID, r.home())
	if errors.Is(err, blockdev.ErrNotFound) {
		spec := Spec{ID: r.ID, Kind: blockdev.VhostUser, ReadOnly: r.ReadOnly, Size: r.Size, refuse: true}
		if err = spec.check(); err == nil {
			w, err = s.begin(ctx, spec, r.home())
		}
	}
	if err != nil {
		return err
	}
	return os.Lchown(w.socket, owner, -1)
}

// owner is the user whose the socket of an opening is, be it the worker's or already that
// of who refuses; 0 where there is none.
func (s *Starter) owner(r Refusal) int {
	for _, name := range []string{s.path(string(r.ID), dataSocket(r.Opening)), s.path(r.home(), dataSocket(""))} {
		info, err := os.Stat(name)
		if err != nil {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			return int(st.Uid)
		}
	}
	return 0
}

// Lead has those who connect to an opening that has ended come to who refuses, for which Refuse
// has been called.
func (s *Starter) Lead(r Refusal) error {
	to := filepath.Join("..", r.home(), dataSocket(""))
	return blockdev.Op("control.Lead", r.ID, s.lead(s.path(string(r.ID), dataSocket(r.Opening)), to))
}

// AwaitRefused returns when the virtual machine has come to who refuses it, or 3 s
// later.
func (s *Starter) AwaitRefused(ctx context.Context, r Refusal) error {
	w := &Worker{s: s, id: r.ID, home: r.home()}
	return blockdev.Op("control.AwaitRefused", r.ID, w.awaitClient(ctx))
}

// lead makes a name lead to a socket, whatever it was before.
func (s *Starter) lead(name, to string) error {
	fresh := name + ".new"
	if err := os.MkdirAll(filepath.Dir(name), 0o711); err != nil { //nolint:gosec // as New says
		return err
	}
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(to, fresh); err != nil {
		return err
	}
	return os.Rename(fresh, name)
}

// awaitClient waits until somebody is connected, or was expected for long enough.
func (w *Worker) awaitClient(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, comeTime)
	defer cancel()
	for {
		s, err := w.Status(ctx)
		switch {
		case ctx.Err() != nil, err == nil && s.Clients > 0:
			return nil
		case err != nil:
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(comeTime / 300):
		}
	}
}

// refuses reports whether a name leads to a process that refuses and runs. What one has
// left that does not is taken away, but for the name.
func (s *Starter) refuses(ctx context.Context, name string) (bool, error) {
	to, err := os.Readlink(name)
	if err != nil {
		return false, err
	}
	home := filepath.Base(filepath.Dir(to))
	if !strings.HasPrefix(home, refusePrefix) {
		return false, nil
	}
	return s.listens(ctx, home)
}

// listens reports whether a worker has the sockets of a directory. What one has left
// that does not is taken away.
func (s *Starter) listens(ctx context.Context, home string) (bool, error) {
	w := &Worker{s: s, home: home}
	c, err := w.dial(ctx)
	if errors.Is(err, blockdev.ErrNotFound) {
		return false, s.clear(ctx, home)
	}
	if errors.Is(err, syscall.EAGAIN) { // its queue is full: it does not answer
		return true, nil
	}
	if err == nil {
		_ = c.Close() // nothing was said
	}
	return true, err
}

// Sweep takes away what workers have left that have ended, and what leads to those. It
// must not run beside any Serve or Refuse.
func (s *Starter) Sweep(ctx context.Context) error {
	return blockdev.Op("control.Sweep", "", s.eachHome(func(home string) error {
		_, err := s.listens(ctx, home)
		return err
	}))
}

// eachHome does something to each directory of a worker: those of who refuses first,
// to which names in the others lead.
func (s *Starter) eachHome(do func(home string) error) error {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, refusing := range []bool{true, false} {
		for _, e := range entries {
			refuses := strings.HasPrefix(e.Name(), refusePrefix)
			if e.IsDir() && refuses == refusing && (refuses || blockdev.ID(e.Name()).Valid()) {
				errs = append(errs, do(e.Name()))
			}
		}
	}
	return errors.Join(errs...)
}

// EndRefusals ends all processes that refuse: virtual machines that are connected to them wait
// from then on.
func (s *Starter) EndRefusals(ctx context.Context) error {
	return blockdev.Op("control.EndRefusals", "", s.eachHome(func(home string) error {
		if !strings.HasPrefix(home, refusePrefix) {
			return s.clearNames(ctx, home)
		}
		w := &Worker{s: s, home: home}
		return w.end(ctx, w.seize, func(pidfd *os.File) error {
			_, err := w.call(ctx, &wire.Request{Op: wire.Stop})
			if errors.Is(err, blockdev.ErrNotFound) {
				err = nil
			}
			return err
		})
	}))
}

// clearNames takes away a directory in which there is nothing but names that lead nowhere.
func (s *Starter) clearNames(ctx context.Context, home string) error {
	_, err := s.listens(ctx, home)
	return err
}

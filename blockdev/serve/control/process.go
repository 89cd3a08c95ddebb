package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// note writes down which process a worker is. That it runs is not said by it; it is for
// who has to end one that does not answer.
func (s *Starter) note(home string, pid int) error {
	boot, err := sys.BootID()
	if err != nil {
		return err
	}
	start, err := sys.StartTime(pid)
	if err != nil {
		return err
	}
	return os.WriteFile(s.path(home, processNote), fmt.Appendf(nil, "%d %d %s\n", pid, start, boot), 0o600)
}

// noted opens the process that a note says, which nothing but pid, start time and boot
// together name. fs.ErrNotExist where there is none of this boot, os.ErrProcessDone when
// it has ended.
func (s *Starter) noted(home string) (*os.File, error) {
	b, err := os.ReadFile(s.path(home, processNote))
	if err != nil {
		return nil, err
	}
	boot, err := sys.BootID()
	if err != nil {
		return nil, err
	}
	var pid int
	var start uint64
	var of string
	if _, err := fmt.Sscanf(string(b), "%d %d %s", &pid, &start, &of); err != nil || of != boot {
		return nil, fs.ErrNotExist
	}
	pidfd, err := sys.OpenPidfd(pid)
	if err != nil {
		return nil, err
	}
	now, err := sys.StartTime(pid) // by number: it is of the one that is held if that has not ended
	alive, asked := sys.PidfdAlive(pidfd)
	if err == nil && asked == nil && alive && now == start {
		return pidfd, nil
	}
	if err = errors.Join(asked, pidfd.Close()); err == nil {
		err = os.ErrProcessDone
	}
	return nil, err
}

// seize opens the process of a worker that need not answer. blockdev.ErrNotFound when
// nobody listens at its socket.
func (w *Worker) seize(ctx context.Context) (*os.File, error) {
	c, err := w.dial(ctx)
	if err == nil {
		err = c.Close() // nothing was said
	}
	if err != nil && !errors.Is(err, syscall.EAGAIN) { // its queue is full of those who have asked in vain
		return nil, err
	}
	pidfd, err := w.s.noted(w.home)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, os.ErrProcessDone) { // a daemon of before has started it, or it has just ended
		return w.hold(ctx)
	}
	return pidfd, err
}

// Kill ends the worker of an image at once, also one that does not answer: see
// Worker.Kill. None is success.
func (s *Starter) Kill(ctx context.Context, id blockdev.ID) error {
	return (&Worker{s: s, id: id, home: string(id)}).Kill(ctx)
}

// KillBeside is Kill for who does not know whether somebody starts the next worker of the
// image as soon as this one has ended: what it leaves is left, as its directory may be the
// next one's by then.
func (s *Starter) KillBeside(ctx context.Context, id blockdev.ID) error {
	w := &Worker{s: s, id: id, home: string(id)}
	return blockdev.Op("control.KillBeside", id, w.halt(ctx, w.seize, sys.KillProcess))
}

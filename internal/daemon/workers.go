package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/sparse"
	"holdfast/internal/preflight"
)

const (
	// workerNone is the value of the setting worker for a host without workers.
	workerNone = "none"
	workerName = "holdfast-blockd"
	// Each worker has a user and group of its own, below those that sandboxes get.
	workerUsers, firstWorkerUser = 1 << 16, 0x6fff0000
)

// workerProgram is the program that serves a volume, "" where the host has none.
func workerProgram(c Config) (string, error) {
	switch c.Worker {
	case workerNone:
		return "", nil
	case "":
		self, err := os.Executable()
		if err != nil {
			return "", err
		}
		beside := filepath.Join(filepath.Dir(self), workerName)
		if _, err := os.Stat(beside); err != nil {
			return "", nil //nolint:nilerr // it is not installed: workerCheck says what that means
		}
		return beside, nil
	}
	if _, err := os.Stat(c.Worker); err != nil {
		return "", fmt.Errorf("%w: worker: %w", ErrHost, err)
	}
	return c.Worker, nil
}

// workersDir is where the workers of a host's daemon have their sockets; what they
// say is in a file of this name with ".log" behind it.
func workersDir(host string) string { return filepath.Join(runDir, "serve-"+host[:min(12, len(host))]) }

// notesDir is where is noted what of thin pools is open at workers.
func notesDir(host string) string { return filepath.Join(runDir, "opened-"+host[:min(12, len(host))]) }

// workersOf is what starts workers and finds those of earlier daemons.
func workersOf(program, host string, log *os.File) (*control.Starter, error) {
	if err := errors.Join(os.MkdirAll(runDir, 0o711), os.Chmod(runDir, 0o711)); err != nil { //nolint:gosec // see runDir
		return nil, err
	}
	return control.New(control.Options{
		Program: program, Dir: workersDir(host), Cgroup: "holdfast-" + filepath.Base(workersDir(host)),
		User: firstWorkerUser, Group: firstWorkerUser, Users: workerUsers, Log: log,
	})
}

// openWorkers makes ready what serves volumes over sockets. What workers say is kept
// beside their sockets until the next boot.
func (n *node) openWorkers(ctx context.Context, host string) (sparse.Workers, error) {
	program, err := workerProgram(n.c)
	if err != nil || program == "" {
		return nil, err
	}
	if err := os.MkdirAll(runDir, 0o711); err != nil { //nolint:gosec // see runDir
		return nil, err
	}
	log, err := os.OpenFile(workersDir(host)+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	n.later("log of the workers", log.Close)
	workers, err := workersOf(program, host, log)
	if err != nil {
		return nil, err
	}
	if err := workers.Sweep(ctx); err != nil { // of some use, and no more
		n.log.Warn("what workers have left that ended could not be taken away", "err", err)
	}
	n.log.Info("workers", "program", program)
	return workers, nil
}

// removeWorkers ends what an ended daemon has left, flushed, and takes its directory. blockdev.ErrBusy while
// somebody uses a volume by one.
func removeWorkers(ctx context.Context, host string) error {
	workers, err := workersOf("", host, nil)
	if err != nil {
		return err
	}
	ids, err := workers.List(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := endWorker(ctx, workers, id); err != nil {
			return err
		}
	}
	if err := errors.Join(workers.EndRefusals(ctx), workers.Sweep(ctx)); err != nil {
		return err
	}
	if err := os.RemoveAll(notesDir(host)); err != nil { // of openings that have ended now
		return err
	}
	for _, left := range []string{workersDir(host), workersDir(host) + ".log"} {
		if err := os.Remove(left); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// answerTime is how long a worker may take to answer whether somebody uses it.
const answerTime = 10 * time.Second

func endWorker(ctx context.Context, workers *control.Starter, id blockdev.ID) error {
	asking, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	w, err := workers.Find(asking, id)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	var s serve.Service
	if err == nil {
		s, err = w.Status(asking)
	}
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		return nil
	case err != nil && asking.Err() != nil && ctx.Err() == nil:
		return fmt.Errorf("%w: the holdfast-blockd that serves volume %s does not answer: it is stopped, or its disk does not answer it. Let it go on (kill -CONT) or end it (kill -KILL), and try again", blockdev.ErrBusy, id)
	case err != nil:
		return err
	case s.Clients > 0:
		return fmt.Errorf("%w: process %d serves volume %s to %d clients", blockdev.ErrBusy, s.Pid, id, s.Clients)
	}
	return w.Stop(ctx)
}

// workerCheck says whether volumes can be served over sockets.
func workerCheck(c Config) preflight.Check {
	check := preflight.Check{Name: "worker", Status: preflight.OK}
	program, err := workerProgram(c)
	switch {
	case c.Worker == workerNone:
		check.Status, check.Found = preflight.Warn, "none"
	case err != nil:
		check.Status, check.Found = preflight.Fail, strings.TrimPrefix(err.Error(), ErrHost.Error()+": ")
		check.Consequence, check.Fix = "the daemon does not start", "install it there, or leave the setting worker out"
		return check
	case program == "":
		check.Status, check.Found = preflight.Warn, workerName+" is not installed beside holdfastd"
	default:
		check.Found = program
		return check
	}
	check.Consequence = "no volume is exported or served over vhost-user, and a pool that cannot share bytes copies what a template holds at each create"
	check.Fix = "install " + workerName + " beside holdfastd, or name it with the setting worker"
	return check
}

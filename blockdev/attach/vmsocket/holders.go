package vmsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

const (
	// A process that is being started has what the one that starts it had open (this
	// one's files too) until it executes its program: a holder is one that stays, or has
	// not executed any for longer than a busy machine takes.
	passingLooks = 5
	passingWait  = 10 * time.Millisecond
	startingTime = 5 * time.Second
)

// Holders finds the processes of this host, this one apart, that have a file or
// device open, or are connected to the socket that a file is: each as a target with pid, start time and boot. Not found are those
// that this process may not ask (of other rights or namespaces), what only maps it, a
// kernel's own opening, and what was handed to io_uring and closed: none found is no
// proof.
func (d *Door) Holders(ctx context.Context, file string) ([]attach.Target, error) {
	found, err := d.holders(file, everybody)
	for look := 0; err == nil && len(found) > 0 && (look < passingLooks || slices.ContainsFunc(found, starting)); look++ {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(passingWait):
		}
		before := found
		found, err = d.holders(file, func() ([]int, error) { return pidsOf(before), nil })
	}
	return found, err
}

func starting(t attach.Target) bool {
	is, err := sys.Starting(t.Pid, startingTime)
	return err == nil && is
}

func pidsOf(targets []attach.Target) []int {
	pids := make([]int, len(targets))
	for i, t := range targets {
		pids[i] = t.Pid
	}
	return pids
}

func everybody() ([]int, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// holders looks once, at some processes.
func (d *Door) holders(file string, among func() ([]int, error)) ([]attach.Target, error) {
	want, err := wanted(file)
	if err != nil {
		return nil, err
	}
	pids, err := among()
	if err != nil {
		return nil, err
	}
	var found []attach.Target
	for _, pid := range pids {
		holds, err := holdsPlace(pid, want)
		if err == nil && holds {
			var t attach.Target
			if t, err = d.pin(pid, want); err == nil {
				found = append(found, t)
			}
		}
		if err != nil && !errors.Is(err, blockdev.ErrGone) && !errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("what process %d has open: %w", pid, err)
		}
	}
	return found, nil
}

// wanted tells an opening of a file from others.
func wanted(file string) (func(sys.Place) bool, error) {
	place, err := sys.PlaceBehind(file)
	if err != nil || !place.IsSocket() {
		return func(other sys.Place) bool { return same(place, other) }, err
	}
	peers, err := sys.SocketPeers(place)
	return func(other sys.Place) bool { return other.IsSocket() && peers[other.Inode] }, err
}

// pin holds on to a process and looks again, so that it is the one that was seen.
func (d *Door) pin(pid int, want func(sys.Place) bool) (attach.Target, error) {
	p, err := openProcess(pid)
	if err != nil {
		return attach.Target{}, err
	}
	defer p.Close()
	holds, err := holdsPlace(pid, want)
	if gone := p.Alive(); gone != nil {
		return attach.Target{}, gone
	}
	if err == nil && !holds {
		err = blockdev.ErrGone
	}
	return attach.Target{Pid: pid, StartTime: p.startTime, Boot: d.boot}, err
}

// holdsPlace reports whether a process has a place open. blockdev.ErrGone when it
// ended meanwhile.
func holdsPlace(pid int, want func(sys.Place) bool) (bool, error) {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	fds, err := os.Open(dir)
	if err == nil {
		defer fds.Close()
		var names []string
		if names, err = fds.Readdirnames(-1); err == nil {
			return holdsAmong(dir, names, want)
		}
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, os.ErrProcessDone) || errors.Is(err, syscall.ESRCH) {
		return false, blockdev.ErrGone
	}
	return false, err
}

func holdsAmong(dir string, names []string, want func(sys.Place) bool) (bool, error) {
	for _, name := range names {
		place, err := sys.PlaceBehind(dir + "/" + name)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) { // closed since
			continue
		}
		if err != nil {
			return false, err
		}
		if want(place) {
			return true, nil
		}
	}
	return false, nil
}

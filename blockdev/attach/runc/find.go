package runc

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	gorunc "github.com/containerd/go-runc"

	"holdfast/blockdev"
	"holdfast/internal/run"
)

const (
	// stateTime bounds one "runc state", which takes some 30 ms.
	stateTime = 15 * time.Second
	// findTries: a guess, runc's answer, and one container replaced meanwhile.
	findTries = 3
	// longest is the kernel's bound on a path (PATH_MAX, with its final NUL).
	longest = 4095
)

// containerForm is what runc itself accepts as an id, without a leading dash.
var containerForm = regexp.MustCompile(`^[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,254}$`)

func validContainer(id string) error {
	if !containerForm.MatchString(id) || id == "." || id == ".." {
		return invalid("target.container must be 1 to 255 of A-Z a-z 0-9 _ + . - and not begin with a dash")
	}
	return nil
}

func validMountPath(p string) error {
	switch {
	case !path.IsAbs(p):
		return invalid("mountPath must be an absolute path inside the container")
	case p != path.Clean(p):
		return invalid("mountPath must be clean: no %q, %q, double or final slash", ".", "..")
	case p == "/":
		return invalid("mountPath must not be /")
	case len(p) > longest:
		return invalid("mountPath is longer than %d bytes", longest)
	case !utf8.ValidString(p), strings.ContainsFunc(p, unicode.IsControl):
		return invalid("mountPath must be UTF-8 without control characters")
	}
	for _, kernel := range []string{"/proc", "/sys", "/dev"} {
		if p == kernel || strings.HasPrefix(p, kernel+"/") {
			return invalid("mountPath must not be in %s", kernel)
		}
	}
	return nil
}

// find finds a container's first process: by its record when that leaves no doubt,
// else by asking runc.
func (a *Attacher) find(ctx context.Context, root, id string) (*process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r := record(root, id)
	if p := r.process(); p != nil {
		return p, nil
	}
	return a.ask(ctx, root, id, r.Pid)
}

// ask finds a container's first process by runc. By the time that runc has told a
// pid, that may be somebody else's; so a process is opened first, and is the right
// one if runc then tells its pid and it still lives. The first guess is the hint.
func (a *Attacher) ask(ctx context.Context, root, id string, hint int) (*process, error) {
	for range findTries {
		var p *process
		var openErr error
		if hint > 0 {
			p, openErr = openProcess(hint)
		}
		c, err := a.state(ctx, root, id)
		switch {
		case err == nil && c.Pid == hint && openErr != nil:
			err = openErr
		case err == nil && c.Pid == hint:
			if err = p.alive(); err == nil {
				return p, nil
			}
		}
		if p != nil {
			p.close()
		}
		if err != nil {
			return nil, err
		}
		hint = c.Pid
	}
	return nil, fmt.Errorf("%w: container %s is being replaced", blockdev.ErrBusy, id)
}

// state asks runc for a container that has a live first process.
func (a *Attacher) state(ctx context.Context, root, id string) (*gorunc.Container, error) {
	command, err := run.Look(a.o.Command)
	if err != nil {
		return nil, fmt.Errorf("containers cannot be found: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, stateTime)
	defer cancel()
	c, err := (&gorunc.Runc{Command: command, Root: root}).State(ctx, id)
	if err != nil {
		return nil, classify(ctx, id, err)
	}
	switch c.Status {
	case "running", "created":
		if c.Pid <= 0 {
			return nil, fmt.Errorf("runc tells no process of container %s", id)
		}
		return c, nil
	case "paused", "pausing":
		return nil, fmt.Errorf("%w: container %s is paused: resume it first", blockdev.ErrBusy, id)
	case "stopped":
		return nil, fmt.Errorf("%w: container %s has stopped", blockdev.ErrGone, id)
	}
	return nil, fmt.Errorf("%w: container %s is %q", blockdev.ErrBusy, id, c.Status)
}

// classify reads runc's text: go-runc passes it on without a type.
func classify(ctx context.Context, id string, err error) error {
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("runc state %s: %w", id, errors.Join(context.Cause(ctx), err))
	case strings.Contains(err.Error(), "does not exist"):
		return fmt.Errorf("%w: there is no container %s", blockdev.ErrGone, id) // runc's own words are of its files on this host
	}
	return fmt.Errorf("runc state %s: %w", id, err)
}

package vmsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// queueTime bounds the wait for a place in the queue of who listens.
const queueTime = time.Second

// Door leads to the sockets that an operator allows. It is safe for concurrent use.
type Door struct {
	prefixes []string
	boot     string
	log      *slog.Logger
}

// New allows sockets below prefixes: absolute, clean directories other than "/".
// None means that no target is allowed. blockdev.ErrInvalid names the rule.
func New(prefixes []string, log *slog.Logger) (*Door, error) {
	for _, p := range prefixes {
		if err := attach.CheckPath(p); err != nil {
			return nil, fmt.Errorf("directory %q: %w", p, err)
		}
	}
	boot, err := sys.BootID()
	if err != nil {
		return nil, err
	}
	return &Door{prefixes: prefixes, boot: boot, log: log}, nil
}

// Resolve checks a caller's target of a type and completes it with the process
// that listens on its socket now. blockdev.ErrInvalid for a target that can never
// work, blockdev.ErrGone when nobody listens.
func (d *Door) Resolve(ctx context.Context, kind string, t attach.Target, mountPath string) (attach.Target, error) {
	switch {
	case t.Stray("socket", "agent", "qemuAgent", "transport") != "":
		return t, invalid("a %s target has a socket only, and those of agents in the guest", kind)
	case t.QemuAgent != "" && kind != "qemu":
		return t, invalid("target.qemuAgent does not apply to a %s target", kind)
	case t.Transport != "" && (t.Transport != string(blockdev.VhostUser) || kind == "firecracker"):
		return t, invalid("target.transport is %q or nothing, for targets of QEMU and Cloud Hypervisor", blockdev.VhostUser)
	case mountPath != "" && t.Agent == "":
		return t, invalid("mountPath does not apply to a %s target without an agent: the guest mounts the device", kind)
	case mountPath != "":
		if err := attach.CheckPath(mountPath); err != nil {
			return t, fmt.Errorf("mountPath: %w", err)
		}
	}
	conn, pid, err := d.connect(ctx, "target.socket", t.Socket)
	if err != nil {
		return t, err
	}
	defer conn.Close()
	if pid == os.Getpid() || pid == 1 {
		return t, invalid("target.socket is not a VMM's: process %d listens on it", pid)
	}
	p, err := openProcess(pid)
	if errors.Is(err, blockdev.ErrGone) {
		return t, fmt.Errorf("%w: the process that made the socket has left it to another one, which cannot be told", blockdev.ErrGone)
	}
	if err != nil {
		return t, err
	}
	defer p.Close()
	resolved := attach.Target{Type: kind, Socket: t.Socket, Agent: t.Agent, QemuAgent: t.QemuAgent, Transport: t.Transport, Pid: pid, StartTime: p.startTime, Boot: d.boot}
	return resolved, errors.Join(d.beside(ctx, resolved, "target.agent", t.Agent), d.beside(ctx, resolved, "target.qemuAgent", t.QemuAgent))
}

// beside checks another socket of a target, "" for none: the VMM itself must listen.
func (d *Door) beside(ctx context.Context, t attach.Target, field, socket string) error {
	if socket == "" {
		return nil
	}
	conn, pid, err := d.connect(ctx, field, socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if pid != t.Pid {
		return invalid("%s is not of the virtual machine of target.socket: process %d listens on it, and the VMM is process %d", field, pid, t.Pid)
	}
	return nil
}

// Dial connects to the socket of a resolved target, and to nobody but the process
// that was found there. blockdev.ErrGone when that has ended.
func (d *Door) Dial(ctx context.Context, t attach.Target) (net.Conn, error) {
	return d.DialBeside(ctx, t, "target.socket", t.Socket)
}

// DialBeside is Dial to another socket of the target, which stands in a field of it.
func (d *Door) DialBeside(ctx context.Context, t attach.Target, field, socket string) (net.Conn, error) {
	p, err := d.Open(t)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	conn, pid, err := d.connect(ctx, field, socket)
	if err == nil && pid != t.Pid {
		conn.Close()
		err = fmt.Errorf("%w: process %d listens on the VMM's socket, and the VMM is process %d", blockdev.ErrBusy, pid, t.Pid)
	}
	if err != nil {
		if gone := p.Gone(ctx); gone != nil {
			return nil, gone
		}
		if errors.Is(err, blockdev.ErrGone) { // it lives, and cannot be asked
			err = fmt.Errorf("%w: the VMM (process %d) lives, and does not listen on its socket", blockdev.ErrBusy, t.Pid)
		}
		return nil, err
	}
	return conn, nil
}

// connect opens a connection to a socket that stands in a field of the target, and
// tells who listens.
func (d *Door) connect(ctx context.Context, field, socket string) (net.Conn, int, error) {
	prefix, rest, err := d.split(field, socket)
	if err != nil {
		return nil, 0, err
	}
	node, err := openSocket(prefix, rest)
	if err != nil {
		return nil, 0, explain(field, err)
	}
	defer node.Close()
	// By descriptor: nobody can put another node in its place, and a path may be
	// longer than the 108 bytes of an address.
	name, err := sys.SocketPath(node)
	if err != nil {
		return nil, 0, err
	}
	conn, err := dial(ctx, name)
	if err != nil {
		return nil, 0, explain(field, err)
	}
	pid, err := sys.PeerPid(conn.(*net.UnixConn)) //nolint:forcetypeassert // of network "unix"
	if err == nil && pid <= 0 {
		err = fmt.Errorf("%w: the process that listens is not visible from this one's pid namespace", blockdev.ErrInvalid)
	}
	if err != nil {
		conn.Close()
		return nil, 0, err
	}
	return conn, pid, nil
}

// dial connects. A monitor's queue has room for one connection: one that is full may
// be empty in a moment.
func dial(ctx context.Context, name string) (net.Conn, error) {
	for waiting := time.NewTimer(queueTime); ; {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", name)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-waiting.C:
			return nil, err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func openSocket(prefix, rest string) (*os.File, error) {
	dir, err := openDirectory(prefix, rest)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return sys.OpenSocketBeneath(dir, path.Base(rest))
}

// openDirectory opens the one that a path below a prefix leads to, all but its last name.
func openDirectory(prefix, rest string) (*os.File, error) {
	prefix, err := filepath.EvalSymlinks(prefix) // links in it are the operator's
	if err != nil {
		return nil, err
	}
	top, err := sys.OpenPath(prefix)
	if err != nil {
		return nil, err
	}
	defer top.Close()
	return sys.OpenBeneath(top, path.Dir(rest), sys.Walk{})
}

// Directory opens (O_PATH) the directory of a path that stands in a field of a target,
// below one of those that the operator allows, through no symbolic link; name is the
// path's last one, which need not be there. blockdev.ErrInvalid with the rule.
func (d *Door) Directory(field, at string) (dir *os.File, name string, err error) {
	prefix, rest, err := d.split(field, at)
	if err != nil {
		return nil, "", err
	}
	dir, err = openDirectory(prefix, rest)
	if errors.Is(err, fs.ErrNotExist) {
		err = invalid("the directory of %s does not exist", field)
	}
	if err != nil {
		return nil, "", explain(field, err)
	}
	return dir, path.Base(rest), nil
}

// split finds the longest allowed prefix of a socket's path, and the rest.
func (d *Door) split(field, socket string) (prefix, rest string, err error) {
	if err := attach.CheckPath(socket); err != nil {
		return "", "", fmt.Errorf("%s: %w", field, err)
	}
	for _, p := range d.prefixes {
		if below, ok := strings.CutPrefix(socket, p+"/"); ok && len(p) > len(prefix) {
			prefix, rest = p, below
		}
	}
	if prefix == "" {
		return "", "", invalid("%s must be below one of the directories that the operator allows", field)
	}
	return prefix, rest, nil
}

// explain says why a socket cannot be reached.
func explain(field string, err error) error {
	switch {
	case errors.Is(err, syscall.ELOOP):
		return invalid("%s leads through a symbolic link, and none is followed", field)
	case errors.Is(err, syscall.ENOTSOCK):
		return invalid("%s is not a unix socket", field)
	case errors.Is(err, syscall.ENOTDIR):
		return invalid("%s leads through something that is not a directory, or through a symbolic link", field)
	case errors.Is(err, syscall.ENAMETOOLONG):
		return invalid("%s has a name that is too long", field)
	case errors.Is(err, syscall.EPROTOTYPE):
		return invalid("%s is not a stream socket", field)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: there is no such socket", blockdev.ErrGone)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nobody listens on the socket", blockdev.ErrGone)
	case errors.Is(err, syscall.EAGAIN):
		return fmt.Errorf("%w: the VMM does not take connections from its socket", blockdev.ErrBusy)
	}
	return err
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", blockdev.ErrInvalid, fmt.Errorf(format, args...))
}

// Allows is nil for a socket's path, which need not be there yet, below one of the
// directories that the operator allows; else blockdev.ErrInvalid with the rule.
func (d *Door) Allows(socket string) error {
	_, _, err := d.split("socket", socket)
	return err
}

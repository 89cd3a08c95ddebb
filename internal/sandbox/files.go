package sandbox

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/api"
	"holdfast/engine"
)

const (
	// fileTime bounds a file operation that moves no content.
	fileTime = time.Minute
	// listRoom bounds the listing of a directory, in bytes.
	listRoom = 8 << 20
)

// The exit codes by which the scripts say what busybox says in words.
const (
	exitMissing = 41
	exitIsDir   = 42
	exitNotDir  = 43
	exitSpecial = 44 // neither file nor directory: reading it could wait for ever
	exitFull    = 45 // a directory that is not empty
)

// The scripts get paths as arguments, never as text of theirs. b is busybox.
const (
	look = `b=` + toolPath + `
[ -e "$1" ] || [ -L "$1" ] || exit 41
if [ -d "$1" ]; then echo dir; exec $b find "$1/" -mindepth 1 -maxdepth 1 -exec $b stat -c "$2" {} +; fi
echo file; exec $b stat -L -c "$2" "$1"`
	read = `b=` + toolPath + `
[ -e "$1" ] || exit 41
[ -d "$1" ] && exit 42
[ -f "$1" ] || exit 44
exec $b cat "$1"`
	write = `b=` + toolPath + `
[ -d "$1" ] && exit 42
[ -e "$1" ] && [ ! -f "$1" ] && exit 44
$b mkdir -p "$($b dirname "$1")" || exit 1
$b cat >"$1" || exit 1
[ -z "$2" ] || exec $b chmod "$2" "$1"`
	makeDir = `b=` + toolPath + `
[ -e "$1" ] && [ ! -d "$1" ] && exit 43
$b mkdir -p "$1" || exit 1
[ -z "$2" ] || exec $b chmod "$2" "$1"`
	remove = `b=` + toolPath + `
[ -e "$1" ] || [ -L "$1" ] || exit 41
if [ -d "$1" ] && [ ! -L "$1" ]; then
  [ "$2" = true ] && exec $b rm -rf "$1"
  $b rmdir "$1" 2>/dev/null && exit 0
  exit 45
fi
exec $b rm -f "$1"`
	join = `b=` + toolPath + `
to=$1 mode=$2; shift 2
[ -d "$to" ] && exit 42
$b mkdir -p "$($b dirname "$to")" || exit 1
for part; do [ -f "$part" ] || exit 41; done
: >"$to" || exit 1
for part; do $b cat "$part" >>"$to" && $b rm -f "$part" || exit 1; done
[ -z "$mode" ] || exec $b chmod "$mode" "$to"`
)

// inside runs a script in a sandbox. stdin may be nil.
func (r *Runtime) inside(ctx context.Context, workspace, name, script string, stdin io.Reader, stdout io.Writer, args ...string) error {
	_, rec, err := r.up(workspace, name)
	if err != nil {
		return err
	}
	if !r.begin() {
		return stopping()
	}
	defer r.steps.Done()
	var said tail
	spec := newProcess(append([]string{toolPath, "sh", "-c", script, "sh"}, args...), nil, "/")
	c, err := r.containers.exec(rec.ID, spec, stdin != nil, stdout, &said)
	if err != nil {
		if alive, e := r.containers.alive(rec.First); e == nil && !alive {
			return down(rec)
		}
		return err
	}
	if c.pidfd != nil {
		defer c.pidfd.Close()
	}
	var broken error
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		if stdin == nil {
			return
		}
		_, broken = io.Copy(c.stdin, stdin)
		_ = c.stdin.Close()
	}()
	select {
	case <-c.done:
	case <-ctx.Done():
		_ = c.signal(syscall.SIGKILL)
		<-c.done
		return ctx.Err()
	}
	if c.failed != nil {
		return c.failed
	}
	if c.code != 0 {
		return refused(args[0], c.code, said.String())
	}
	<-fed // it has read to the end, or the source broke off before
	if broken != nil && !errors.Is(broken, syscall.EPIPE) {
		return broken
	}
	return nil
}

func refused(file string, code int, said string) error {
	switch code {
	case exitMissing:
		return problem(engine.ErrNotFound, "", "%s not found", file)
	case exitIsDir:
		return problem(api.ErrSandboxFile, "", "%s is a directory", file)
	case exitNotDir:
		return problem(api.ErrSandboxFile, "", "%s is there and is not a directory", file)
	case exitSpecial:
		return problem(api.ErrSandboxFile, "", "%s is neither a file nor a directory", file)
	case exitFull:
		return problem(api.ErrSandboxFile, "", "%s is not empty: remove it with recursive=true", file)
	}
	said = strings.TrimSpace(said)
	if said == "" {
		said = "exit status " + strconv.Itoa(code)
	}
	return problem(api.ErrSandboxFile, "", "%s", said)
}

// tail keeps the first bytes of what a tool complains about.
type tail struct{ bytes.Buffer }

func (t *tail) Write(b []byte) (int, error) {
	t.Buffer.Write(b[:min(len(b), max(0, 1024-t.Len()))])
	return len(b), nil
}

// bounded drops what is more than its room.
type bounded struct {
	bytes.Buffer
	room int
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.room {
		return 0, fmt.Errorf("more than %d bytes", b.room)
	}
	return b.Buffer.Write(p)
}

// Look describes a file, or lists a directory.
func (r *Runtime) Look(ctx context.Context, workspace, name, file string) (api.SandboxEntry, error) {
	ctx, cancel := context.WithTimeout(ctx, fileTime)
	defer cancel()
	// No name that a tenant chooses has this mark in it: it is made now.
	mark := rand.Text()
	text := &bounded{room: listRoom}
	err := r.inside(ctx, workspace, name, look, nil, text, file, mark+"|%f|%s|%Y|%U|%G|%a|%n")
	if err != nil {
		return api.SandboxEntry{}, err
	}
	kind, rest, _ := strings.Cut(text.String(), "\n")
	e := api.SandboxEntry{Dir: kind == "dir"}
	for _, line := range strings.Split(rest, mark+"|")[1:] {
		f, dir, err := parseStat(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return e, err
		}
		f.Name = path.Base(f.Path)
		switch {
		case !e.Dir:
			e.Info = f
		case dir:
			e.Dirs = append(e.Dirs, f.Name)
		default:
			f.Path = path.Join(file, f.Name)
			e.Entries = append(e.Entries, f)
		}
	}
	return e, nil
}

// parseStat reads a line of stat -c "%f|%s|%Y|%U|%G|%a|%n".
func parseStat(line string) (f api.SandboxFile, dir bool, err error) {
	parts := strings.SplitN(line, "|", 7)
	if len(parts) < 7 {
		return f, false, fmt.Errorf("stat in a sandbox: %.100q", line)
	}
	mode, err1 := strconv.ParseUint(parts[0], 16, 32)
	size, err2 := strconv.ParseInt(parts[1], 10, 64)
	seconds, err3 := strconv.ParseInt(parts[2], 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return f, false, fmt.Errorf("stat in a sandbox: %w", err)
	}
	valid := func(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
	f = api.SandboxFile{
		Path: valid(path.Clean(parts[6])), Size: size, Permissions: parts[5], Owner: valid(parts[3]), Group: valid(parts[4]),
		LastModified: stamp(time.Unix(seconds, 0)),
	}
	return f, mode&syscall.S_IFMT == syscall.S_IFDIR, nil
}

// ReadFile writes a file's bytes to w.
func (r *Runtime) ReadFile(ctx context.Context, workspace, name, file string, to io.Writer) error {
	return r.inside(ctx, workspace, name, read, nil, to, file)
}

// WriteFile writes a file, whose directory is made if it is missing.
func (r *Runtime) WriteFile(ctx context.Context, workspace, name, file, permissions string, from io.Reader) error {
	return r.inside(ctx, workspace, name, write, from, io.Discard, file, permissions)
}

// MakeDir makes a directory and those above it; it is there is success.
func (r *Runtime) MakeDir(ctx context.Context, workspace, name, dir, permissions string) error {
	ctx, cancel := context.WithTimeout(ctx, fileTime)
	defer cancel()
	return r.inside(ctx, workspace, name, makeDir, nil, io.Discard, dir, permissions)
}

// RemoveFile removes a file or a directory, with recursive also one that is not empty.
func (r *Runtime) RemoveFile(ctx context.Context, workspace, name, file string, recursive bool) error {
	ctx, cancel := context.WithTimeout(ctx, fileTime)
	defer cancel()
	return r.inside(ctx, workspace, name, remove, nil, io.Discard, file, strconv.FormatBool(recursive))
}

// JoinFiles makes one file of parts, in order, and removes them.
func (r *Runtime) JoinFiles(ctx context.Context, workspace, name, file, permissions string, parts []string) error {
	return r.inside(ctx, workspace, name, join, nil, io.Discard, append([]string{file, permissions}, parts...)...)
}

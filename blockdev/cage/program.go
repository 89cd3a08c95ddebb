package cage

import (
	"errors"
	"io"
	"io/fs"
	"os"
)

// ownProgram is this process's program, also after another one has taken its name.
const ownProgram = "/proc/self/exe"

// program gives a path of this process's program for runc to bind. That is its
// name, or, after an upgrade has put another program there, a copy: what is inside
// and what is here speak one language.
func (c *Cages) program() (string, error) {
	name, err := os.Readlink(ownProgram)
	if err != nil {
		return "", err
	}
	own, err := os.Stat(ownProgram)
	if err != nil {
		return "", err
	}
	named, err := os.Stat(name)
	if err == nil && os.SameFile(own, named) {
		return name, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.path("program"), copyProgram(c.path("program"))
}

func copyProgram(to string) (err error) {
	if _, err := os.Stat(to); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	src, err := os.Open(ownProgram)
	if err != nil {
		return err
	}
	defer src.Close()
	tmp := to + ".new"
	dst, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755) //nolint:gosec // a program, in a directory of ours
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	if err = errors.Join(err, dst.Chmod(0o755), dst.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, to)
}

package daemon

import (
	"errors"
	"io/fs"
	"os"
)

// takeCleanMark tells whether the process before this one stopped in order, and
// takes its mark away: until this one has stopped in order too there is none. A
// new state directory has nothing that could have been hurt.
func (n *node) takeCleanMark() (clean bool, err error) {
	err = os.Remove(n.at.clean())
	if errors.Is(err, fs.ErrNotExist) {
		_, err = os.Stat(n.at.host())
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		return false, err
	}
	if err != nil {
		return false, err
	}
	return true, syncDir(n.at.dir)
}

// leaveCleanMark says that all was flushed and closed, if it was.
func (n *node) leaveCleanMark() error {
	if !n.orderly {
		return nil
	}
	return writeFile(n.at.clean(), []byte("stopped in order\n"))
}

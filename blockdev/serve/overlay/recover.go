package overlay

import (
	"errors"

	"holdfast/blockdev"
)

// Recover readies a layer whose writer has ended in any way, and that nobody has open,
// for whoever opens it next, at whatever place in a stack. killed says that the writer
// has been killed while this kernel ran, and that its clients live on: then what it had
// acknowledged is there, flushed or not, as far as the data's file tells what was written
// (a Witness, whatever it Witnesses). Otherwise what was flushed is, and what was not
// either is from now on or never will be.
//
// Durable on return.
func Recover(f Files, killed bool) error {
	return blockdev.Op("overlay.Recover", "", recoverLayer(f, killed))
}

func recoverLayer(f Files, killed bool) error {
	l, err := openLayer(f, false)
	if err != nil {
		return err
	}
	if l.loose { // it is looked for anyway
		return nil
	}
	whole := run{0, blocksOf(l.size)}
	if !l.witness && !killed {
		return l.drop(whole)
	}
	if err := l.adopt(whole); err != nil || len(l.pending) == 0 {
		return untold(err)
	}
	if l.witness { // the map need not have it, but has to say so
		return l.settle(l.pending)
	}
	return l.tighten()
}

// drop gives back what lies in the data and is not held.
func (l *layer) drop(r run) error {
	w, ok := l.Data.(Witness)
	if !ok {
		return nil
	}
	var punched error
	err := w.Written(r.first*BlockSize, min(r.end*BlockSize, l.size), func(from, to int64) {
		punched = errors.Join(punched, l.fill(run{from / BlockSize, (to + BlockSize - 1) / BlockSize}, func(missing run) error {
			return l.Data.Punch(missing.first*BlockSize, (missing.end-missing.first)*BlockSize)
		}))
	})
	return errors.Join(untold(err), punched)
}

// untold is an error without that of a file that cannot tell what was written.
func untold(err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

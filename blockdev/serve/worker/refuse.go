package worker

import (
	"errors"
	"fmt"
	"os"
	"time"

	"holdfast/blockdev"
)

// refuseTime is how long a process that refuses waits for a virtual machine, one that
// stands still among them.
const refuseTime = time.Hour

// returnTime is how long it waits for one that was there: QEMU tries once a second, and less
// often on a busy machine. One that finds nobody waits for ever with what it has in flight.
const returnTime = 20 * time.Second

// errTaken is what every request to a volume gets that was taken from its virtual
// machine.
var errTaken = errors.New("the volume was taken away by force")

// nothing is a device without bytes, in the place of one that was taken away.
type nothing struct{ size int64 }

func (n nothing) Size() int64                            { return n.size }
func (nothing) BlockSize() int                           { return 512 }
func (nothing) ReadAt([]byte, int64) (int, error)        { return 0, errTaken }
func (nothing) WriteAt([]byte, int64) (int, error)       { return 0, errTaken }
func (nothing) Sync() error                              { return errTaken }
func (nothing) Discard(int64, int64) error               { return errTaken }
func (nothing) Zero(int64, int64, bool) error            { return errTaken }
func (nothing) Extent(int64, int64) (int64, bool, error) { return 0, false, errTaken }

// refuse serves a virtual machine as long as it is connected, and ends when it has hung
// up for returnTime, or has not come for refuseTime.
func (w *worker) refuse() error {
	w.volume.left = func() { _ = w.data.SetDeadline(time.Now().Add(returnTime)) } // or it is closed
	if err := w.data.SetDeadline(time.Now().Add(refuseTime)); err != nil {
		return err
	}
	err := w.volume.front.serve(w.data)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// refused is blockdev.ErrInvalid for what only a volume can do.
func (w *worker) refused() error {
	if w.volume.words.Refuse {
		return fmt.Errorf("%w: there is no volume", blockdev.ErrInvalid)
	}
	return nil
}

// serveData serves those who come to the data socket.
func (w *worker) serveData() error {
	if w.volume.words.Refuse {
		return w.refuse()
	}
	return w.volume.front.serve(w.data)
}

var _ shown = nothing{}

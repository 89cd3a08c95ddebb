package opened

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
)

// gentleTime bounds the wait for a worker that is told to flush and to end, before it is
// killed.
const gentleTime = 10 * time.Second

// Gently bounds what is tried before a worker is killed: to a third of the time that ctx
// leaves, at most 10 s.
func Gently(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := gentleTime
	if end, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(end)/3)
	}
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer or end within %s", limit.Round(time.Millisecond)))
}

// Severing takes an image from whoever has it by its worker.
type Severing struct {
	Workers Workers
	Log     *slog.Logger
	ID      blockdev.ID
	Note    Note  // of its opening
	Size    int64 // bytes
	// Worker gives the one that runs, ready to be told to end.
	Worker func(ctx context.Context) (*control.Worker, error)
	// End ends the opening: with a worker that runs by telling it to end, without one (nil) as Close
	// does after it has died. blockdev.ErrFailed, when all else is done, for a flush that has
	// failed.
	End func(ctx context.Context, w *control.Worker) error
}

// Sever ends the worker and the opening. On nil, or blockdev.ErrFailed, no process has the image any more
// by that opening. A worker that does not answer or
// end in time, see Gently, is killed: what it had acknowledged is in its files. A virtual machine that was
// connected has its requests refused from then on, see control.Starter.Refuse.
func (s Severing) Sever(ctx context.Context) error {
	owner := s.Workers.Owner(s.ID, s.Note.Socket())
	connected, err := s.gently(ctx)
	if err != nil && !errors.Is(err, blockdev.ErrFailed) && ctx.Err() == nil {
		if !errors.Is(err, blockdev.ErrNotFound) {
			s.Log.Warn("a worker does not end as it is told, and is killed", "id", s.ID, "cause", err)
		}
		// Also of one that has ended, as it seems: one that lives may have hung up.
		if err = s.Workers.Kill(ctx, s.ID); err == nil {
			err = s.End(ctx, nil)
		}
	}
	if err != nil && !errors.Is(err, blockdev.ErrFailed) {
		return err
	}
	if s.Note.Kind == blockdev.VhostUser && connected {
		refused := s.Workers.Refuse(ctx, control.Refusal{ID: s.ID, Opening: s.Note.Socket(), ReadOnly: s.Note.ReadOnly, Size: s.Size, Owner: owner})
		if refused != nil { // nobody writes in any case
			s.Log.Warn("a virtual machine whose volume was taken away waits: its requests cannot be refused", "id", s.ID, "cause", refused)
		}
	}
	return err
}

// gently tells the worker to end; connected is false when it is known that it had no
// client.
func (s Severing) gently(ctx context.Context) (connected bool, err error) {
	bounded, cancel := Gently(ctx)
	defer cancel()
	w, err := s.Worker(bounded)
	if err != nil {
		return true, err
	}
	status, err := w.Status(bounded)
	if err != nil {
		return true, err
	}
	return status.Clients > 0, s.End(bounded, w)
}

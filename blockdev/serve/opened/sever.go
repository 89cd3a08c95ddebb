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
	// Stop tells it to end, see control.Worker.Stop.
	Stop func(ctx context.Context, w *control.Worker) error
	// Close ends the opening of a worker that has ended: in its own time, with a flush
	// that has failed or not (nil), or killed.
	Close func(ctx context.Context, killed bool, failed error) error
}

// Sever ends the worker and the opening. On nil, or blockdev.ErrFailed, no process has the image any more
// by that opening. A worker that does not answer or
// end in time, see Gently, is killed: what it had acknowledged is in its files. A virtual machine that was
// connected has its requests refused from then on, see control.Starter.Refuse.
//
// Who refuses is ready before the worker ends, and found where it was before the opening
// does: nothing tells of it afterwards, and a crash in between is followed by Sever again.
func (s Severing) Sever(ctx context.Context) error {
	w, connected, err := s.find(ctx)
	refuses := s.Note.Kind == blockdev.VhostUser && connected
	refusal := control.Refusal{ID: s.ID, Opening: s.Note.Socket(), ReadOnly: s.Note.ReadOnly, Size: s.Size}
	if refuses {
		refuses = s.refused(s.ready(ctx, refusal))
	}
	killed, failed, err := s.end(ctx, w, err)
	if err != nil {
		return err
	}
	if refuses {
		refuses = s.refused(s.Workers.Lead(refusal))
	}
	err = s.Close(ctx, killed, failed)
	if refuses && (err == nil || errors.Is(err, blockdev.ErrFailed)) {
		s.refused(s.Workers.AwaitRefused(ctx, refusal))
	}
	return err
}

// find gives the worker, or why it cannot be told to end; connected is false when it is known that it
// has no client.
func (s Severing) find(ctx context.Context) (w *control.Worker, connected bool, err error) {
	bounded, cancel := Gently(ctx)
	defer cancel()
	w, err = s.Worker(bounded)
	if err != nil {
		return nil, true, err
	}
	status, err := w.Status(bounded)
	return w, err != nil || status.Clients > 0, err
}

// ready starts who refuses.
func (s Severing) ready(ctx context.Context, r control.Refusal) error {
	bounded, cancel := Gently(ctx)
	defer cancel()
	return s.Workers.Refuse(bounded, r)
}

// refused reports whether refusing goes well. Where it does not nobody writes either.
func (s Severing) refused(err error) bool {
	if err != nil {
		s.Log.Warn("a virtual machine whose volume is taken away waits: its requests cannot be refused", "id", s.ID, "cause", err)
	}
	return err == nil
}

// end ends the worker, as it is told if nothing was against that so far. Of one that was
// not killed failed is what Stop says.
func (s Severing) end(ctx context.Context, w *control.Worker, against error) (killed bool, failed, err error) {
	if against == nil {
		bounded, cancel := Gently(ctx)
		defer cancel()
		if against = s.Stop(bounded, w); against == nil || errors.Is(against, blockdev.ErrFailed) {
			return false, against, nil
		}
	}
	if ctx.Err() != nil {
		return false, nil, against
	}
	if !errors.Is(against, blockdev.ErrNotFound) {
		s.Log.Warn("a worker does not end as it is told, and is killed", "id", s.ID, "cause", against)
	}
	// Also of one that has ended, as it seems: one that lives may have hung up.
	return true, nil, s.Workers.Kill(ctx, s.ID)
}

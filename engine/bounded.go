package engine

import (
	"context"
	"errors"
	"time"

	"holdfast/blockdev"
)

// The steps of an attachment that may hang, in the words that a user is told.
// Each runs on a goroutine of its own and is given Options.StepLimit; see stepOf.
const (
	stepResolve       = "finding the sandbox"
	stepPrepare       = "checking and growing the filesystem"
	stepOpen          = "opening and mounting the device"
	stepAttach        = "mounting in the sandbox"
	stepDescribe      = "writing the volume's description"
	stepProbe         = "asking the sandbox"
	stepDetach        = "unmounting in the sandbox"
	stepMountInside   = "mounting in the guest"
	stepUnmountInside = "unmounting in the guest"
	stepInside        = "asking the guest"
	stepResize        = "telling the sandbox of the new size"
	stepClose         = "flushing and releasing the device"
	stepShutdown      = "shutting the filesystem down"
	stepAbandon       = "letting the shut down filesystem go"
	stepSever         = "cutting the image off"
	stepEndWorker     = "ending the volume's worker"
	stepKill          = "ending the sandbox"
	defaultStep       = 20 * time.Second
	longestGrace      = time.Second
	closeGrace        = 5 * time.Second
	maxStepsAtOnce    = 8 // of the background
)

// stepOf runs a part of an attachment's life in bounded time. At the limit its
// context ends; what has not ended a moment later hangs (a system call that
// cannot be interrupted, say): the volume's lock, which the caller holds, stays
// with it until it ends, and the caller gets *hanging. Nothing else is done to the
// volume meanwhile, and nothing of other volumes waits. When it ends at last, Run
// looks at the volume again. do must not touch the caller's variables after that:
// it gives its result by value.
func stepOf[T any](ctx context.Context, e *Engine, id blockdev.ID, what string, do func(context.Context) (T, error)) (T, error) {
	bounded, cancel := context.WithTimeout(ctx, e.o.StepLimit)
	return bound(bounded, e, id, what, func() (T, error) {
		defer cancel()
		return do(bounded)
	})
}

// longStepOf is stepOf for work that may rightly take longer (a check of a large
// filesystem): it is not interrupted at the limit, but goes on by itself.
func longStepOf[T any](ctx context.Context, e *Engine, id blockdev.ID, what string, do func(context.Context) (T, error)) (T, error) {
	bounded, cancel := context.WithTimeout(ctx, e.o.StepLimit)
	return bound(bounded, e, id, what, func() (T, error) {
		defer cancel()
		return do(ctx)
	})
}

// step is stepOf for a part without a result.
func (e *Engine) step(ctx context.Context, id blockdev.ID, what string, do func(context.Context) error) error {
	_, err := stepOf(ctx, e, id, what, func(ctx context.Context) (struct{}, error) { return struct{}{}, do(ctx) })
	return err
}

type outcome[T any] struct {
	v   T
	err error
}

func bound[T any](limit context.Context, e *Engine, id blockdev.ID, what string, do func() (T, error)) (T, error) {
	var zero T
	if h := e.locks.hung(id); h != nil {
		return zero, h
	}
	since := e.now()
	done := make(chan outcome[T], 1)
	go func() {
		var o outcome[T]
		o.err = e.timed(what, func() (err error) {
			o.v, err = do()
			return err
		})
		done <- o
	}()
	select {
	case o := <-done:
		return o.v, o.err
	case <-limit.Done():
	}
	grace := time.NewTimer(min(longestGrace, e.o.StepLimit/4))
	defer grace.Stop()
	select {
	case o := <-done:
		return o.v, o.err
	case <-grace.C:
	}
	h := &hanging{what, since}
	e.count(countHung)
	e.o.Log.Error("a step hangs: the volume waits for its end", "volume", id, "step", what, "since", since)
	ended := make(chan struct{})
	go func() {
		o := <-done
		e.o.Log.Info("a step that hung has ended", "volume", id, "step", what, "err", o.err)
		if !e.forced(id) { // what is lost by force was meant to be
			_ = e.inspect(o.err)
		}
		close(ended)
		e.watch(id)
		e.wake()
	}()
	e.locks.hang(id, h, ended)
	return zero, h
}

// forced reports whether an attachment of a volume is being taken away by force.
func (e *Engine) forced(id blockdev.ID) bool {
	v, ok := e.catalog.get(id)
	return ok && v.forced()
}

func (v Volume) forced() bool {
	for _, a := range v.Attachments {
		if a.Forced {
			return true
		}
	}
	return false
}

// hangs finds the step that hangs in an error, nil for none.
func hangs(err error) *hanging {
	var h *hanging
	if errors.As(err, &h) {
		return h
	}
	return nil
}

// hangingProblem tells a user what hangs.
func hangingProblem(v Volume, err error) error {
	h := hangs(err)
	if h == nil {
		return err
	}
	return &Problem{Kind: ErrHanging, Message: "volume \"" + v.Name + "\" waits: " + h.Error() + "; nothing else is done to it until that ends, and then it goes on by itself", Err: err}
}

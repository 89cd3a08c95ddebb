package engine

import (
	"context"
	"maps"
	"slices"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/serve"
)

// sentry waits for the end of one sandbox, for the volumes that are in it.
type sentry struct {
	volumes map[blockdev.ID]struct{}
	stop    context.CancelFunc
}

// guard lets Run know at once when a sandbox of the volume's attachments ends.
func (e *Engine) guard(v Volume) {
	e.guardWorker(v)
	for _, a := range v.Attachments {
		watcher, ok := e.o.Attachers[a.Target.Type].(attach.Sentry)
		if !ok || a.Phase == Detaching || e.notStarted(a) {
			continue
		}
		e.mu.Lock()
		s := e.sentries[a.Target]
		if s == nil {
			ctx, stop := context.WithCancel(e.ctx)
			s = &sentry{volumes: map[blockdev.ID]struct{}{}, stop: stop}
			e.sentries[a.Target] = s
			go e.standGuard(ctx, watcher, a.Target, s)
		}
		s.volumes[v.ID] = struct{}{}
		e.mu.Unlock()
	}
}

func (e *Engine) standGuard(ctx context.Context, watcher attach.Sentry, t attach.Target, s *sentry) {
	err := watcher.AwaitEnd(ctx, t)
	called := ctx.Err() != nil
	s.stop()
	e.mu.Lock()
	if e.sentries[t] == s {
		delete(e.sentries, t)
	}
	ended := maps.Clone(s.volumes)
	e.mu.Unlock()
	if called && err != nil {
		return
	}
	if err != nil { // the next look at the volume makes another sentry
		e.o.Log.Warn("the end of a sandbox cannot be waited for: it is asked from time to time", "err", err)
		return
	}
	for id := range ended {
		e.watch(id)
	}
	e.wake()
}

// unguard ends the sentry of a target that the volume is in no more.
func (e *Engine) unguard(v Volume, t attach.Target) {
	for _, a := range v.Attachments {
		if a.Target == t {
			return
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if k := e.keepers[v.ID]; k != nil && len(v.Attachments) == 0 {
		delete(e.keepers, v.ID)
		k.stop()
	}
	s := e.sentries[t]
	if s == nil {
		return
	}
	delete(s.volumes, v.ID)
	if len(s.volumes) == 0 {
		delete(e.sentries, t)
		s.stop()
	}
}

// dismissKeeper ends the keeper of a volume whose worker is to end.
func (e *Engine) dismissKeeper(id blockdev.ID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if k := e.keepers[id]; k != nil {
		delete(e.keepers, id)
		k.stop()
	}
}

// keeper waits for the end of a volume's worker.
type keeper struct{ stop context.CancelFunc }

// briefly is how long a worker lives at least that is started again as soon as it has
// ended: others wait for the next look.
const briefly = time.Second

// guardWorker lets Run know at once when the worker of a volume ends that is in use:
// its clients wait for the next one.
func (e *Engine) guardWorker(v Volume) {
	sentry, ok := e.o.Pool.(serve.Sentry)
	if ok && slices.ContainsFunc(v.Attachments, func(a Attachment) bool { return isSocket(a.Kind) && a.Phase == Attached }) {
		e.keep(v.ID, func(ctx context.Context, k *keeper) { e.keepWorker(ctx, sentry, v.ID, k) })
	}
}

// keep has one keeper stand by a volume.
func (e *Engine) keep(id blockdev.ID, stand func(ctx context.Context, k *keeper)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.keepers[id] != nil {
		return
	}
	ctx, stop := context.WithCancel(e.ctx)
	k := &keeper{stop}
	e.keepers[id] = k
	go stand(ctx, k)
}

func (e *Engine) keepWorker(ctx context.Context, sentry serve.Sentry, id blockdev.ID, k *keeper) {
	begin := time.Now()
	err := sentry.AwaitEnd(ctx, id)
	called := ctx.Err() != nil
	k.stop()
	e.mu.Lock()
	if e.keepers[id] == k {
		delete(e.keepers, id)
	}
	e.mu.Unlock()
	switch {
	case called:
	case err != nil: // the next look at the volume makes another one
		e.o.Log.Warn("the end of a worker cannot be waited for: it is asked from time to time", "volume", id, "err", err)
	case time.Since(begin) >= e.briefly:
		e.o.Log.Warn("the worker of a volume has ended", "volume", id)
		e.watch(id)
		e.wake()
	}
}

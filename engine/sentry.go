package engine

import (
	"context"
	"maps"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// sentry waits for the end of one sandbox, for the volumes that are in it.
type sentry struct {
	volumes map[blockdev.ID]struct{}
	stop    context.CancelFunc
}

// guard lets Run know at once when a sandbox of the volume's attachments ends.
func (e *Engine) guard(v Volume) {
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

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/meter"
)

// IO is what goes through a volume, and what it waits for.
type IO struct {
	Volume   Volume
	Counters *blockdev.Counters // nil while it has no device, or nobody counts
	Service  *serve.Service     // nil: no worker serves it
	Waits    []Wait             // now, the worst first; never empty
}

// WaitCause is what a volume waits for, in a word.
type WaitCause string

const (
	WaitNothing   WaitCause = "nothing"
	WaitUnknown   WaitCause = "unknown" // who does its I/O does not tell
	WaitStep      WaitCause = "step"    // a step of this host
	WaitWorker    WaitCause = "worker"  // the process that serves it, which is gone or does not answer
	WaitFreeze    WaitCause = "freeze"
	WaitFailed    WaitCause = "failed" // for its next opening: a flush has failed
	WaitHydration WaitCause = "hydration"
	WaitThrottle  WaitCause = "throttle"
	WaitFlush     WaitCause = "flush"
	WaitDevice    WaitCause = "device"
)

// Wait is something that a volume waits for, in words for its user.
type Wait struct {
	Cause    WaitCause
	Requests int64 // that wait for it; 0 where it is not known
	Text     string
}

// IO asks who serves a volume. It waits for nothing that is being done to it.
func (e *Engine) IO(ctx context.Context, workspace, name string) (IO, error) {
	v, err := e.Volume(workspace, name)
	if err != nil {
		return IO{}, err
	}
	return e.ioOf(ctx, v), ctx.Err()
}

// IOInUse is IO of a workspace's attached volumes in the order of their names, at
// most limit; more tells that there are others.
func (e *Engine) IOInUse(ctx context.Context, workspace string, limit int) (all []IO, more bool, err error) {
	var used []Volume
	e.catalog.each(func(v Volume) {
		if v.Workspace == workspace && len(v.Attachments) > 0 {
			used = append(used, v)
		}
	})
	slices.SortFunc(used, func(a, b Volume) int { return strings.Compare(a.Name, b.Name) })
	if more = len(used) > limit; more {
		used = used[:limit]
	}
	all = make([]IO, len(used))
	beside(len(used), func(n int) {
		if ctx.Err() == nil {
			all[n] = e.ioOf(ctx, used[n])
		}
	})
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	return all, more, nil
}

// askedAtOnce bounds the volumes that are asked about beside each other.
const askedAtOnce = 256

// beside does something for each of n, several at once: one that takes its time is not
// waited for by the others' turn.
func beside(n int, do func(n int)) {
	var all sync.WaitGroup
	places := make(chan struct{}, askedAtOnce)
	for i := range n {
		places <- struct{}{}
		all.Go(func() {
			defer func() { <-places }()
			do(i)
		})
	}
	all.Wait()
}

// Services asks the workers of all volumes that are attached, in pools that are open.
// silent are those that have not answered in time.
func (e *Engine) Services(ctx context.Context) (services map[blockdev.ID]serve.Service, silent int) {
	var used []blockdev.ID
	e.catalog.each(func(v Volume) {
		if len(v.Attachments) > 0 {
			used = append(used, v.ID)
		}
	})
	services = map[blockdev.ID]serve.Service{}
	var mu sync.Mutex
	beside(len(used), func(n int) {
		s, err := e.observe(ctx, used[n])
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err == nil:
			services[used[n]] = s
		case !errors.Is(err, blockdev.ErrNotFound) && !errors.Is(err, blockdev.ErrUnavailable):
			silent++
		}
	})
	return services, silent
}

// observe asks the worker of a volume, for as long as a question may take;
// blockdev.ErrNotFound for none.
func (e *Engine) observe(ctx context.Context, id blockdev.ID) (serve.Service, error) {
	ctx, cancel := context.WithTimeout(ctx, statTime)
	defer cancel()
	observer, ok := e.o.Pool.(serve.Observer)
	if !ok {
		return serve.Service{}, blockdev.ErrNotFound
	}
	s, err := observer.Observe(ctx, id)
	if errors.Is(err, errors.ErrUnsupported) {
		err = blockdev.ErrNotFound
	}
	return s, err
}

func (e *Engine) ioOf(ctx context.Context, v Volume) IO {
	out := IO{Volume: v}
	s, err := e.observe(ctx, v.ID)
	served := overWorker(e.endpointNow(v.ID)) || slices.ContainsFunc(v.Attachments, func(a Attachment) bool { return isSocket(a.Kind) && !a.Forced })
	switch {
	case err == nil:
		out.Service = &s
	case errors.Is(err, blockdev.ErrUnavailable):
		out.Waits = []Wait{{Cause: WaitUnknown, Text: "the volume's pool is not available: what serves the volume goes on, and cannot be asked until the pool is"}}
	case !errors.Is(err, blockdev.ErrNotFound):
		e.o.Log.Warn("the worker of a volume does not answer", "volume", v.ID, "workspace", v.Workspace, "err", err)
		out.Waits = []Wait{{Cause: WaitWorker, Text: fmt.Sprintf("the worker that serves the volume has not answered within %s: its process is stopped, or hangs in the pool's disk, and the volume's requests wait for it. "+
			"When it goes on nothing is lost; a detach by force kills it and takes the volume away", statTime)}}
	case served:
		out.Waits = []Wait{{Cause: WaitWorker, Text: "the worker that serves the volume has ended, and the next one is being started: requests of a virtual machine, and of who has it mounted, wait for it, and nothing that was acknowledged is lost; " +
			"NBD clients have to connect again. If this stays, it cannot be started: the operator's log says why"}}
	}
	if err == nil || errors.Is(err, blockdev.ErrNotFound) { // who does not answer is not asked twice
		out.Counters = e.counters(ctx, v)
	}
	out.Waits = append(waitsOf(v, e.locks.hung(v.ID), e.o.Now()), out.Waits...)
	if out.Service != nil {
		out.Waits = append(out.Waits, servedWaits(s)...)
	}
	if len(out.Waits) == 0 {
		out.Waits = []Wait{calm(v, out.Service, out.Counters)}
	}
	return out
}

// counters are what went through a volume's device: what its sandboxes count, or
// the pool; nil for nobody.
func (e *Engine) counters(ctx context.Context, v Volume) *blockdev.Counters {
	ctx, cancel := context.WithTimeout(ctx, statTime)
	defer cancel()
	if c := e.countedInside(ctx, v); c != nil {
		return c
	}
	meter, ok := e.o.Pool.(blockdev.Meter)
	if !ok {
		return nil
	}
	c, err := meter.Counters(ctx, v.ID)
	if err != nil {
		return nil
	}
	return &c
}

// waitsOf is what this host has a volume wait for.
func waitsOf(v Volume, hung *hanging, now time.Time) (waits []Wait) {
	if hung != nil {
		waits = append(waits, Wait{Cause: WaitStep, Text: fmt.Sprintf("this host waits for %s since %s, which has not come back: nothing else can be done to the volume until it does",
			hung.what, hung.since.UTC().Format(time.RFC3339))})
	}
	for _, a := range v.Attachments {
		if a.Phase == Attached && a.Failure == "" {
			continue
		}
		text := fmt.Sprintf("attachment %s (%s) is %s", a.ID, a.Holder, a.Phase)
		if a.Failure != "" {
			text += ": " + a.Failure
		}
		waits = append(waits, Wait{Cause: WaitStep, Text: text})
	}
	if v.frozenAt(now) {
		waits = append(waits, Wait{Cause: WaitFreeze, Text: fmt.Sprintf("all writes are held until %s, or until it is thawed", v.Frozen.Until.UTC().Format(time.RFC3339))})
	}
	return waits
}

// servedWaits is what a worker says of its requests. Why a base fails is its
// operator's to know.
func servedWaits(s serve.Service) (waits []Wait) {
	if s.Failed != "" {
		waits = append(waits, Wait{Cause: WaitFailed, Text: "a flush has failed: no write is acknowledged any more until the volume was detached and attached again"})
	}
	hydrating := s.Meter.Waits[meter.Hydration].Now
	switch l := s.Layers; {
	case l != nil && !l.FailingSince.IsZero():
		waits = append(waits, Wait{WaitHydration, hydrating, fmt.Sprintf("%s wait for blocks of the volume's base, which does not answer since %s (%d tries); it is asked again and again, and nothing is lost",
			requests(hydrating), l.FailingSince.UTC().Format(time.RFC3339), l.Tries)})
	case hydrating > 0:
		waits = append(waits, Wait{WaitHydration, hydrating, requests(hydrating) + " wait for blocks that come from the volume's base"})
	}
	for _, w := range []struct {
		cause WaitCause
		of    meter.Cause
		text  string
	}{
		{WaitThrottle, meter.Throttle, " wait because of the attachment's limits (" + limitsText(s.Limits) + ")"},
		{WaitFlush, meter.Flushing, " wait until what was written is on stable storage"},
		{WaitDevice, meter.Device, " wait for the pool's disk"},
	} {
		if n := s.Meter.Waits[w.of].Now; n > 0 {
			waits = append(waits, Wait{w.cause, n, requests(n) + w.text})
		}
	}
	return waits
}

func requests(n int64) string {
	if n == 1 {
		return "1 request"
	}
	return fmt.Sprintf("%d requests", n)
}

func limitsText(l blockdev.Limits) string {
	var parts []string
	for _, f := range []struct {
		value int64
		text  string
	}{
		{l.ReadIOPS, "reads/s"}, {l.WriteIOPS, "writes/s"}, {l.ReadBytes, "bytes/s read"}, {l.WriteBytes, "bytes/s written"},
	} {
		if f.value > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", f.value, f.text))
		}
	}
	if len(parts) == 0 {
		return "just lifted"
	}
	return strings.Join(parts, ", ")
}

// calm is said of a volume that waits for nothing else that is known.
func calm(v Volume, s *serve.Service, c *blockdev.Counters) Wait {
	switch {
	case len(v.Attachments) == 0:
		return Wait{Cause: WaitNothing, Text: "nothing: it is not attached"}
	case s == nil && c != nil && c.Inside > 0:
		return Wait{Cause: WaitDevice, Requests: c.Inside, Text: requests(c.Inside) + " are inside the kernel's device at this moment. If they are so each time you ask and none is counted meanwhile, the pool's disk does not answer: " +
			"look at the host's kernel log and at what is below the pool"}
	case s == nil:
		return Wait{Cause: WaitUnknown, Text: "nothing of this service: its requests go past it, through a device of the kernel or a file that the sandbox has open, and what they wait for there is not told"}
	case s.Meter.Inside > 0:
		return Wait{Cause: WaitNothing, Requests: 0, Text: requests(s.Meter.Inside) + " are being served, and none of them waits"}
	}
	return Wait{Cause: WaitNothing, Text: "nothing: there are no requests"}
}

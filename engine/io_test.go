package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/meter"
)

// served is a service whose requests wait for causes.
func served(inside int64, waits map[meter.Cause]int64) serve.Service {
	s := serve.Service{Kind: blockdev.NBD, Clients: 1}
	s.Meter.Inside = inside
	for c, n := range waits {
		s.Meter.Waits[c].Now = n
	}
	return s
}

func TestWaitsOfAWorker(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	failing := served(1, map[meter.Cause]int64{meter.Hydration: 1})
	failing.Layers = &serve.Hydration{FailingSince: since, Tries: 9, Reason: "dial tcp 10.0.0.1: secret"}
	quiet := served(0, nil)
	quiet.Layers = failing.Layers
	limited := served(3, map[meter.Cause]int64{meter.Throttle: 3})
	limited.Limits = blockdev.Limits{ReadIOPS: 100, WriteBytes: 1 << 20}
	broken := served(0, nil)
	broken.Failed = "fdatasync: input/output error"
	for name, c := range map[string]struct {
		of     serve.Service
		causes []WaitCause
		says   string
	}{
		"nothing":            {served(0, nil), nil, ""},
		"device":             {served(2, map[meter.Cause]int64{meter.Device: 2}), []WaitCause{WaitDevice}, "2 requests wait for the pool's disk"},
		"flush before disk":  {served(2, map[meter.Cause]int64{meter.Device: 1, meter.Flushing: 1}), []WaitCause{WaitFlush, WaitDevice}, "1 request wait"},
		"limits are named":   {limited, []WaitCause{WaitThrottle}, "100 reads/s, 1048576 bytes/s written"},
		"base is slow":       {served(4, map[meter.Cause]int64{meter.Hydration: 4}), []WaitCause{WaitHydration}, "4 requests wait for blocks that come from"},
		"base fails":         {failing, []WaitCause{WaitHydration}, "does not answer since 2026-01-02T03:04:05Z (9 tries)"},
		"base fails, unseen": {quiet, []WaitCause{WaitHydration}, "0 requests wait"},
		"a flush has failed": {broken, []WaitCause{WaitFailed}, "no write is acknowledged"},
	} {
		var causes []WaitCause
		text := ""
		for _, w := range servedWaits(c.of) {
			causes, text = append(causes, w.Cause), text+w.Text+"\n"
		}
		if !slices.Equal(causes, c.causes) || !strings.Contains(text, c.says) {
			t.Errorf("%s: %v, %s", name, causes, text)
		}
		if strings.Contains(text, "secret") || strings.Contains(text, "fdatasync") {
			t.Errorf("%s: a tenant is told an operator's matter: %s", name, text)
		}
	}
}

func TestWaitsOfTheHost(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	v := Volume{
		Frozen: &Freeze{Until: now.Add(time.Second), By: "ann"},
		Attachments: []Attachment{
			{ID: "att-1", Holder: "sandbox:a", Phase: Attached},
			{ID: "att-2", Holder: "sandbox:b", Phase: Detaching, Failure: "files are open"},
		},
	}
	waits := waitsOf(v, &hanging{stepDetach, now}, now)
	var causes []WaitCause
	for _, w := range waits {
		causes = append(causes, w.Cause)
	}
	if !slices.Equal(causes, []WaitCause{WaitStep, WaitStep, WaitFreeze}) ||
		!strings.Contains(waits[0].Text, stepDetach) || !strings.Contains(waits[1].Text, "att-2 (sandbox:b) is detaching: files are open") {
		t.Errorf("%+v", waits)
	}
	if waits := waitsOf(v, nil, now.Add(time.Minute)); len(waits) != 1 {
		t.Errorf("after the freeze: %+v", waits)
	}
}

func TestIO(t *testing.T) {
	w := newWorld(t)
	v := w.create("x", 4)
	ctx := t.Context()
	io, err := w.engine.IO(ctx, v.Workspace, "x")
	if err != nil || io.Service != nil || io.Counters != nil || len(io.Waits) != 1 || io.Waits[0].Cause != WaitNothing {
		t.Errorf("detached: %+v, %v", io, err)
	}
	if _, err := w.engine.IO(ctx, v.Workspace, "absent"); !errors.Is(err, ErrNotFound) {
		t.Errorf("absent: %v", err)
	}
	if _, err := w.pool.Open(ctx, v.ID, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}); err != nil {
		t.Fatal(err)
	}
	io, err = w.engine.IO(ctx, v.Workspace, "x")
	if err != nil || io.Service == nil || io.Service.Kind != blockdev.NBD || io.Counters == nil || len(io.Waits) != 1 {
		t.Errorf("served: %+v, %v", io, err)
	}
	if err := w.pool.Die(v.ID); err != nil {
		t.Fatal(err)
	}
	io, err = w.engine.IO(ctx, v.Workspace, "x")
	if err != nil || io.Service != nil {
		t.Errorf("after the worker's death: %+v, %v", io, err)
	}
}

// lookedAt is what is said of a volume that a machine has by a worker, of which the pool says this.
func lookedAt(t *testing.T, s serve.Service, failure error) IO {
	t.Helper()
	w := newLayeredWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	attachTo(t, w, "v", "socket", "one", false)
	w.engine.o.Pool = observedPool{w.pool, s, failure}
	out, err := w.engine.IO(t.Context(), space, "v")
	if err != nil || len(out.Waits) == 0 {
		t.Fatalf("%+v, %v", out, err)
	}
	return out
}

// observedPool is a pool whose workers are told.
type observedPool struct {
	*blockdevtest.Memory
	s   serve.Service
	err error
}

func (p observedPool) Observe(ctx context.Context, _ blockdev.ID) (serve.Service, error) {
	if p.err != nil && !errors.Is(p.err, blockdev.ErrNotFound) {
		<-ctx.Done() // it stands still
		return p.s, p.err
	}
	return p.s, p.err
}

// TestWhyTellsOfTheWorker: one that is away, or that stands still, is what a volume waits
// for, and a question about it is answered in time.
func TestWhyTellsOfTheWorker(t *testing.T) {
	for says, failure := range map[string]error{
		"the next one is being started": blockdev.ErrNotFound,
		"has not answered within":       context.DeadlineExceeded,
	} {
		begin := time.Now()
		out := lookedAt(t, serve.Service{}, failure)
		if w := out.Waits[0]; w.Cause != WaitWorker || !strings.Contains(w.Text, says) {
			t.Errorf("%v: %+v", failure, w)
		}
		if took := time.Since(begin); took > 3*statTime {
			t.Errorf("%v: it took %s", failure, took)
		}
	}
	out := lookedAt(t, served(0, nil), nil)
	if w := out.Waits[0]; w.Cause != WaitNothing {
		t.Errorf("of one that is well: %+v", w)
	}
}

// gatheringPool is a pool whose workers say nothing before so many are asked at once.
type gatheringPool struct {
	*blockdevtest.Memory
	mu     sync.Mutex
	absent int
	all    chan struct{}
}

func (p *gatheringPool) Observe(ctx context.Context, _ blockdev.ID) (serve.Service, error) {
	p.mu.Lock()
	if p.absent--; p.absent == 0 {
		close(p.all)
	}
	p.mu.Unlock()
	select {
	case <-p.all:
		return serve.Service{Kind: blockdev.NBD}, nil
	case <-ctx.Done():
		return serve.Service{}, context.Cause(ctx)
	}
}

// TestWorkersAreAskedAtOnce: one that does not answer keeps nobody from being asked.
func TestWorkersAreAskedAtOnce(t *testing.T) {
	w := newLayeredWorld(t)
	names := []string{"a", "b", "c"}
	for _, name := range names {
		do1(t, w, createOp(name, "demo:1", "ext4", 20))
		attachTo(t, w, name, "socket", "in-"+name, false)
	}
	ask := func(absent int) {
		w.engine.o.Pool = &gatheringPool{Memory: w.pool, absent: absent, all: make(chan struct{})}
	}
	ask(len(names))
	if services, silent := w.engine.Services(t.Context()); len(services) != len(names) || silent != 0 {
		t.Errorf("%d services, and %d silent", len(services), silent)
	}
	ask(len(names))
	all, _, err := w.engine.IOInUse(t.Context(), space, 10)
	if err != nil || len(all) != len(names) {
		t.Fatalf("%d volumes, %v", len(all), err)
	}
	for n, io := range all {
		if io.Volume.Name != names[n] || io.Service == nil {
			t.Errorf("%s: %+v", names[n], io.Waits)
		}
	}
	ask(-1) // none ever says a word
	if services, silent := w.engine.Services(t.Context()); len(services) != 0 || silent != len(names) {
		t.Errorf("%d services, and %d silent", len(services), silent)
	}
}

// shutPool is a pool of which nothing can be asked.
type shutPool struct{ *blockdevtest.Memory }

func (p shutPool) Observe(context.Context, blockdev.ID) (serve.Service, error) {
	return serve.Service{}, blockdev.ErrUnavailable
}

// TestWhyTellsOfAShutPool: that it is not open is not said to be a worker that hangs.
func TestWhyTellsOfAShutPool(t *testing.T) {
	w := newLayeredWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	attachTo(t, w, "v", "socket", "one", false)
	w.engine.o.Pool = shutPool{w.pool}
	if services, silent := w.engine.Services(t.Context()); len(services) != 0 || silent != 0 {
		t.Errorf("%d services, and %d silent", len(services), silent)
	}
	out, err := w.engine.IO(t.Context(), space, "v")
	if err != nil || out.Waits[0].Cause != WaitUnknown || !strings.Contains(out.Waits[0].Text, "pool") {
		t.Errorf("%+v, %v", out.Waits, err)
	}
}

// TestWhyTellsOfTheKernelsDevice: what is inside it is not said to go past this service.
func TestWhyTellsOfTheKernelsDevice(t *testing.T) {
	v := Volume{Attachments: []Attachment{{Kind: blockdev.Block, Phase: Attached}}}
	if w := calm(v, nil, &blockdev.Counters{Inside: 3}); w.Cause != WaitDevice || w.Requests != 3 || !strings.Contains(w.Text, "3 requests are inside the kernel's device") {
		t.Errorf("%+v", w)
	}
	if w := calm(v, nil, &blockdev.Counters{}); w.Cause != WaitUnknown {
		t.Errorf("%+v", w)
	}
}

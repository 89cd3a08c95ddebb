package sparse

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/control"
)

// gathering lets nobody find a worker before so many look for one at once.
type gathering struct {
	Workers
	mu     sync.Mutex
	absent int
	all    chan struct{}
	left   int // who gave up
}

func (w *gathering) Find(ctx context.Context, id blockdev.ID) (*control.Worker, error) {
	w.mu.Lock()
	if w.absent--; w.absent == 0 {
		close(w.all)
	}
	w.mu.Unlock()
	select {
	case <-w.all:
		return w.Workers.Find(ctx, id)
	case <-ctx.Done():
		w.mu.Lock()
		defer w.mu.Unlock()
		w.left++
		return nil, context.Cause(ctx)
	}
}

var byNBD = blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}

// TestAddressIsToldToAllAtOnce: no worker waits for another one's answer until it hears
// where its base is.
func TestAddressIsToldToAllAtOnce(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	m, workers := servedModel(t, nil)
	content, _ := farBytes()
	first, second := newFarStore(t, content), newFarStore(t, content)
	rev := blockdevtest.NewID(blockdev.PrefixRevision)
	if err := m.far(rev, first); err != nil {
		t.Fatal(err)
	}
	leases := map[blockdev.ID]string{}
	for range 3 {
		vol := blockdevtest.NewID(blockdev.PrefixVolume)
		err := m.fork(vol, rev, farModel)
		var e blockdev.Endpoint
		if err == nil {
			e, err = m.pool.Open(t.Context(), vol, byNBD)
		}
		if err != nil {
			t.Fatal(err)
		}
		leases[vol] = e.Lease
	}
	m.pool.workers = &gathering{Workers: workers, absent: len(leases), all: make(chan struct{})}
	if err := m.pool.SetAddress(t.Context(), rev, second.moveTo(t)); err != nil {
		t.Error(err)
	}
	for vol, lease := range leases {
		if err := m.pool.Close(t.Context(), vol, lease); err != nil {
			t.Error(err)
		}
	}
}

// TestListAsksAllAtOnce: a worker that does not answer is not waited for before the next
// is asked what its volume holds.
func TestListAsksAllAtOnce(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	m, workers := servedModel(t, nil)
	rev := blockdevtest.NewID(blockdev.PrefixRevision)
	content, _ := farBytes()
	if err := m.far(rev, newFarStore(t, content)); err != nil {
		t.Fatal(err)
	}
	leases := map[blockdev.ID]string{}
	for range 3 {
		vol := blockdevtest.NewID(blockdev.PrefixVolume)
		err := m.fork(vol, rev, farModel)
		var e blockdev.Endpoint
		if err == nil {
			e, err = m.pool.Open(t.Context(), vol, blockdev.Want{Kinds: byNBD.Kinds, ReadOnly: true})
		}
		if err != nil {
			t.Fatal(err)
		}
		leases[vol] = e.Lease
	}
	together := &gathering{Workers: workers, absent: len(leases), all: make(chan struct{})}
	m.pool.workers = together
	infos, err := m.pool.List(t.Context())
	if err != nil || len(infos) != len(leases)+1 || together.left > 0 {
		t.Errorf("%d images, %v; %d workers were waited for", len(infos), err, together.left)
	}
	for vol, lease := range leases {
		if err := m.pool.Close(t.Context(), vol, lease); err != nil {
			t.Error(err)
		}
	}
}

// silence is workers of whom none is found before the call is given up.
type silence struct {
	Workers
	giveUp context.CancelFunc
}

func (w silence) Find(ctx context.Context, _ blockdev.ID) (*control.Worker, error) {
	w.giveUp()
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// fromNext reads a block of the far model from a worker, which is fetched from another
// store than one that is down.
func fromNext(t *testing.T, socket string, block int64, gone *farStore) {
	t.Helper()
	content, _ := farBytes()
	got := make([]byte, modelBlock)
	c := blockdevtest.DialNBD(t, socket)
	heard := time.AfterFunc(30*time.Second, func() { gone.do(nil) }) // ends the read
	_, err := c.ReadAt(got, block*modelBlock)
	if !heard.Stop() {
		t.Error("its worker goes on asking where the base was")
	}
	if err = errors.Join(err, c.Close()); err != nil || !bytes.Equal(got, content[block*modelBlock:(block+1)*modelBlock]) {
		t.Errorf("read from where the base is by now: %v", err)
	}
}

// TestAddressIsToldLate: a worker that is silent when all are told where their base is
// hears of it when its image is opened, or it is observed, next.
func TestAddressIsToldLate(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	m, workers := servedModel(t, nil)
	content, _ := farBytes()
	here, there := newFarStore(t, content), newFarStore(t, content)
	rev, vol := blockdevtest.NewID(blockdev.PrefixRevision), blockdevtest.NewID(blockdev.PrefixVolume)
	want := blockdev.Want{Kinds: byNBD.Kinds, ReadOnly: true} // so that it copies nothing by itself
	err := errors.Join(m.far(rev, here), m.fork(vol, rev, farModel))
	var e blockdev.Endpoint
	if err == nil {
		e, err = m.pool.Open(t.Context(), vol, want)
	}
	if err != nil {
		t.Fatal(err)
	}
	for block, next := range map[int64]func() error{
		60:  func() error { _, err := m.pool.Open(t.Context(), vol, want); return err },
		300: func() error { _, err := m.pool.Observe(t.Context(), vol); return err },
	} {
		here.do(down)
		there.do(nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		m.pool.workers = silence{workers, cancel}
		if err := m.pool.SetAddress(ctx, rev, there.moveTo(t)); !errors.Is(err, context.Canceled) {
			t.Fatalf("a worker that is silent: %v", err)
		}
		m.pool.workers = workers
		if err := next(); err != nil {
			t.Fatal(err)
		}
		fromNext(t, e.Path, block, here)
		here, there = there, here
	}
	if err := m.pool.Close(t.Context(), vol, e.Lease); err != nil {
		t.Error(err)
	}
}

// TestStartWithWorkersThatStandStill: the pool opens without an answer of workers that were
// left and are stopped, and has their images when they go on, which hear then where their
// base is by now.
func TestStartWithWorkersThatStandStill(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	crash := errors.New("crash")
	m, workers := servedModel(t, func(point string) error {
		if point == "address.tell" {
			return crash
		}
		return nil
	})
	content, _ := farBytes()
	first, second := newFarStore(t, content), newFarStore(t, content)
	rev := blockdevtest.NewID(blockdev.PrefixRevision)
	if err := m.far(rev, first); err != nil {
		t.Fatal(err)
	}
	want := blockdev.Want{Kinds: byNBD.Kinds, ReadOnly: true}
	pids := map[blockdev.ID]int{}
	for range 4 {
		vol := blockdevtest.NewID(blockdev.PrefixVolume)
		err := m.fork(vol, rev, farModel)
		if err == nil {
			_, err = m.pool.Open(t.Context(), vol, want)
		}
		if err != nil {
			t.Fatal(err)
		}
		s, err := m.pool.Observe(t.Context(), vol)
		if err != nil {
			t.Fatal(err)
		}
		pids[vol] = s.Pid
		blockdevtest.StandStill(t, s.Pid)
	}
	first.do(down)
	if err := m.pool.SetAddress(t.Context(), rev, second.moveTo(t)); !errors.Is(err, crash) {
		t.Fatalf("cut short: %v", err)
	}
	m.kept.close()
	const long = 6 * askTime
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	begin := time.Now()
	p, err := Open(ctx, m.kept.dir, Options{Host: "test", Rate: -1, Workers: workers})
	took := time.Since(begin)
	for _, pid := range pids {
		err = errors.Join(err, syscall.Kill(pid, syscall.SIGCONT))
	}
	if err != nil {
		t.Fatal(err)
	}
	m.kept.pool, m.pool = p, p
	if took > long/2 { // each alone would take a sixth
		t.Errorf("it took %s", took)
	}
	for vol := range pids {
		e, err := p.Open(t.Context(), vol, want)
		if err != nil {
			t.Fatal(err)
		}
		fromNext(t, e.Path, 300, first)
		if err := p.Close(t.Context(), vol, e.Lease); err != nil {
			t.Error(err)
		}
	}
}

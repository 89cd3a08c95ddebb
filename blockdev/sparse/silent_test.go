package sparse

import (
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

// TestStartWithWorkersThatStandStill: the pool opens without an answer of workers that were
// left and are stopped, and has their images when they go on.
func TestStartWithWorkersThatStandStill(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	m, workers := servedModel(t, nil)
	leases, pids := map[blockdev.ID]string{}, []int{}
	for range 4 {
		vol := blockdevtest.NewID(blockdev.PrefixVolume)
		err := m.create(vol)
		var e blockdev.Endpoint
		if err == nil {
			e, err = m.pool.Open(t.Context(), vol, byNBD)
		}
		if err != nil {
			t.Fatal(err)
		}
		s, err := m.pool.Observe(t.Context(), vol)
		if err != nil {
			t.Fatal(err)
		}
		leases[vol], pids = e.Lease, append(pids, s.Pid)
		blockdevtest.StandStill(t, s.Pid)
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
	for vol, lease := range leases {
		if err := p.Close(t.Context(), vol, lease); err != nil {
			t.Error(err)
		}
	}
}

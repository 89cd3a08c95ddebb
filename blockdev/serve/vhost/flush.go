package vhost

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/uring"
)

// flusher runs the syncs of a device, one at a time for all loops: a failed one is
// reported by the kernel to one caller only, so nobody may sync beside it and be told
// that all is well. All who ask while one is running share the next.
type flusher struct {
	mu      sync.Mutex
	running bool
	group   []flush // whose sync is running
	waiting []flush // for the next one
	failed  atomic.Pointer[error]
}

// flush is one that a guest asked for.
type flush struct {
	loop    *loop
	request *request
}

func (f *flusher) failure() error {
	if err := f.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// join makes a flush part of the next sync; true when the caller has to begin that.
func (f *flusher) join(one flush) (begin bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.running {
		f.waiting = append(f.waiting, one)
		return false
	}
	f.running = true
	f.group = append(f.group[:0], one)
	return true
}

// flush begins a flush.
func (l *loop) flush(r *request) {
	if l.server.flusher.join(flush{l, r}) {
		l.sync()
	}
}

// done ends a sync: each loop answers those of its flushes that were part of it. The
// first of those that wait begins the next one. by is the loop whose thread calls.
func (f *flusher) done(by *loop, err error) {
	f.mu.Lock()
	if err != nil {
		err = fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
		f.failed.CompareAndSwap(nil, &err)
	}
	ended := append(by.flushed[:0], f.group...)
	by.flushed = ended
	f.group, f.waiting = f.waiting, f.group[:0]
	f.running = len(f.group) > 0
	var next *loop
	if f.running {
		next = f.group[0].loop
	}
	f.mu.Unlock()
	for _, one := range ended {
		if one.loop == by {
			by.finish(one.request, err)
		} else {
			one.loop.ask(func() { one.loop.finish(one.request, err) })
		}
	}
	switch next {
	case nil:
	case by:
		by.sync()
	default:
		next.ask(next.sync)
	}
}

// sync asks for a sync of the device, for all flushes that are part of it. The first
// of them is of this loop, which therefore does not end before.
func (l *loop) sync() {
	f := &l.server.flusher
	switch err := f.failure(); {
	case err != nil:
		f.done(l, err)
	case l.served.file != nil:
		uring.SyncData(l.entry(), l.served.file.Number(), tagSync)
	default:
		l.help(&l.syncing)
	}
}

// synced takes the kernel's answer to a sync. One that was interrupted had not begun.
func (l *loop) synced(res int32) {
	switch errno := syscall.Errno(-res); {
	case res >= 0:
		l.server.flusher.done(l, nil)
	case errno == syscall.EINTR || errno == syscall.EAGAIN:
		l.sync()
	case uring.Canceled(int(res)):
		l.help(&l.syncing)
	default:
		l.server.flusher.done(l, errno)
	}
}

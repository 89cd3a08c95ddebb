package nbd

import (
	"fmt"
	"time"

	"holdfast/blockdev"
)

// Swap puts another device in the place of the one that is served, while clients use
// it: requests that are being performed end in the old one, those that come meanwhile
// wait, then during is called, and what follows goes to the new one. When during
// fails the old one stays. held tells how long requests waited. The new device reads
// as the old one when during returns, is no smaller, and takes the same blocks
// (blockdev.ErrInvalid).
func (e *Export) Swap(d Device, during func() error) (held time.Duration, err error) {
	held, err = e.swap(d, during)
	return held, blockdev.Op("nbd.Swap", "", err)
}

func (e *Export) swap(d Device, during func() error) (time.Duration, error) {
	if block := int64(d.BlockSize()); block > e.block {
		return 0, fmt.Errorf("%w: blocks of %d bytes in the place of %d", blockdev.ErrInvalid, block, e.block)
	}
	next, err := newServed(d)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	e.gate.Lock()
	if err = during(); err == nil {
		e.served = next
	}
	e.gate.Unlock()
	held := time.Since(began)
	e.mu.Lock()
	defer e.mu.Unlock()
	for l := range e.loops {
		l.rouse()
	}
	return held, err
}

// join has a loop roused when what it holds back may go on; leave ends that.
func (e *Export) join(l *loop) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.loops[l] = struct{}{}
}

func (e *Export) leave(l *loop) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.loops, l)
}

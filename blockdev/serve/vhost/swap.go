package vhost

import (
	"fmt"
	"time"

	"holdfast/blockdev"
)

// add starts a loop.
func (s *Server) add(l *loop) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	l.served = s.served
	if err := l.begin(); err != nil {
		return err
	}
	s.loops[l] = struct{}{}
	return nil
}

// remove forgets a loop that has ended.
func (s *Server) remove(l *loop) {
	s.changing.Lock()
	defer s.changing.Unlock()
	delete(s.loops, l)
}

// Swap puts another device in the place of the one that is served, while guests use
// it: requests that have begun end in the old one, those that come meanwhile wait,
// then during is called, and what follows goes to the new one. When during fails
// the old one stays. held tells how long requests waited. The new device reads as the
// old one when during returns, is no smaller, and takes the same blocks
// (blockdev.ErrInvalid).
func (s *Server) Swap(d Device, during func() error) (held time.Duration, err error) {
	held, err = s.swap(newServed(d), during)
	return held, blockdev.Op("vhost.Swap", "", err)
}

func (s *Server) swap(next *served, during func() error) (time.Duration, error) {
	if size := next.device.Size(); next.block > s.block || size < s.size.Load() {
		return 0, fmt.Errorf("%w: %d bytes in blocks of %d in the place of %d in blocks of %d", blockdev.ErrInvalid, size, next.block, s.size.Load(), s.block)
	}
	s.changing.Lock()
	defer s.changing.Unlock()
	began := time.Now()
	quiet := make(map[*loop]chan struct{}, len(s.loops))
	for l := range s.loops {
		c := make(chan struct{})
		quiet[l] = c
		l.ask(func() { l.held, l.quiet = true, c })
	}
	for l, c := range quiet {
		select {
		case <-c:
		case <-l.ended:
		}
	}
	err := during()
	if err == nil {
		s.served = next
		err = s.measure(next)
	}
	served := s.served
	for l := range quiet {
		l.ask(func() { l.held, l.served = false, served })
	}
	return time.Since(began), err
}

// Throttle makes exactly these limits hold from now on, for requests that wait
// already as well; the zero Limits lift all. See throttle.Limiter.
func (s *Server) Throttle(limits blockdev.Limits, burst time.Duration) {
	s.o.Limiter.Set(limits, burst)
	s.changing.Lock()
	defer s.changing.Unlock()
	for l := range s.loops {
		l.ask(l.relimit)
	}
}

package main

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"holdfast/blockdev/attach/guest"
)

const (
	// mostAtOnce bounds the requests that are worked at: each may hang in the kernel.
	mostAtOnce = 16
	// sendTime bounds how long an answer waits for a host that does not read.
	sendTime = 5 * time.Second
)

// stream is a port or connection. Its writes must be able to end.
type stream interface {
	io.Reader
	io.Writer
	SetWriteDeadline(time.Time) error
}

// server answers requests. Those about one disk are worked at one after the other.
type server struct {
	freezes *freezes
	slots   chan struct{}

	mu    sync.Mutex
	disks map[string]*sync.Mutex // by serial, of the requests that are worked at
	users map[string]int
}

func newServer(notes string) *server {
	return &server{freezes: newFreezes(notes), slots: make(chan struct{}, mostAtOnce), disks: map[string]*sync.Mutex{}, users: map[string]int{}}
}

// serve answers what comes over a stream until that ends.
func (s *server) serve(on stream) error {
	out := &answers{on: on}
	return guest.Requests(on, func(r guest.Request) {
		select {
		case s.slots <- struct{}{}:
		default:
			out.send(guest.Answer{ID: r.ID, Failure: &guest.Failure{Code: guest.CodeFailed, Text: "too many requests are being worked at"}})
			return
		}
		go func() {
			defer func() { <-s.slots }()
			s.answer(out, r)
		}()
	})
}

// answer works at a request, and says so from time to time.
func (s *server) answer(out *answers, r guest.Request) {
	done := make(chan guest.Answer, 1)
	go func() { done <- s.do(r) }()
	tick := time.NewTicker(guest.WorkingEvery)
	defer tick.Stop()
	for {
		select {
		case a := <-done:
			a.ID = r.ID
			out.send(a)
			return
		case <-tick.C:
			out.send(guest.Answer{ID: r.ID, Working: true})
		}
	}
}

// answers sends whole lines. What the host does not take in time is dropped: it
// will ask again.
type answers struct {
	mu sync.Mutex
	on stream
}

func (o *answers) send(a guest.Answer) {
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = o.on.SetWriteDeadline(time.Now().Add(sendTime))
	_ = guest.WriteAnswer(o.on, a)
}

// do works at a request, alone with its disk.
func (s *server) do(r guest.Request) guest.Answer {
	switch r.Do {
	case guest.Hello:
		return guest.Answer{Version: guest.Version, Program: version}
	case guest.List:
		return answerOf(list())
	}
	act, ok := actions[r.Do]
	if !ok {
		return failure(failed(guest.CodeUnsupported, "there is no such request"))
	}
	if !guest.ValidSerial(r.Serial) {
		return failure(failed(guest.CodeInvalid, "the serial number"))
	}
	defer s.lock(r.Serial)()
	return answerOf(act(s, r))
}

func (s *server) lock(serial string) (unlock func()) {
	s.mu.Lock()
	m := s.disks[serial]
	if m == nil {
		m = &sync.Mutex{}
		s.disks[serial] = m
	}
	s.users[serial]++
	s.mu.Unlock()
	m.Lock()
	return func() {
		m.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.users[serial]--; s.users[serial] == 0 {
			delete(s.users, serial)
			delete(s.disks, serial)
		}
	}
}

// refusal is an error with a code of the protocol.
type refusal struct{ guest.Failure }

func (r *refusal) Error() string { return r.Code + ": " + r.Text }

func failed(code, text string) error { return &refusal{guest.Failure{Code: code, Text: text}} }

func answerOf(a guest.Answer, err error) guest.Answer {
	if err != nil {
		return failure(err)
	}
	return a
}

// failure says why a request was not carried out.
func failure(err error) guest.Answer {
	var known *refusal
	switch {
	case errors.As(err, &known):
		return guest.Answer{Failure: &known.Failure}
	case errors.Is(err, errors.ErrUnsupported):
		return guest.Answer{Failure: &guest.Failure{Code: guest.CodeUnsupported, Text: err.Error()}}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return guest.Answer{Failure: &guest.Failure{Code: guest.CodeFailed, Text: "the time is over"}}
	}
	return guest.Answer{Failure: &guest.Failure{Code: guest.CodeFailed, Text: err.Error()[:min(len(err.Error()), 512)]}}
}

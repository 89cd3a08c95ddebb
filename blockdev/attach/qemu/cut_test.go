package qemu_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qemu"
)

// line is the way from the daemon to a machine's monitor, on which a connection can be
// cut at any of its commands.
type line struct {
	socket string // where the daemon's attacher finds the monitor
	far    string
	lost   func() // the machine ends, and whoever listens for it

	mu       sync.Mutex
	commands []string // since the last plan
	at       int      // which of them is cut; -1: none
	how      string
	instead  string // of cutInstead: what comes in the place of an answer
}

// The ways to cut: what the daemon asked is not done, is done and not answered, or is
// done and the machine ends. Two more do not end the connection: no answer, and
// something else in its place.
const (
	cutBefore  = "before"
	cutAfter   = "after"
	cutKill    = "kill"
	cutSilence = "silence"
	cutInstead = "instead"
)

func lineTo(t *testing.T, m *machine) *line {
	t.Helper()
	l := &line{socket: filepath.Join(m.dir, "line"), far: m.socket, at: -1}
	hangUp := relay(t, l.socket, l.serve)
	l.lost = func() { hangUp(); m.kill() }
	return l
}

// plan cuts the connection at a command, the qmp_capabilities of each not counted.
func (l *line) plan(at int, how string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.commands, l.at, l.how = nil, at, how
}

// unreached tells that the cut has not come, and takes it back.
func (l *line) unreached() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	is := l.at >= 0
	l.at = -1
	return is
}

func (l *line) seen() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.commands
}

// next tells how a command is cut, "" for not at all.
func (l *line) next(command string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if command == "qmp_capabilities" {
		return ""
	}
	l.commands = append(l.commands, command)
	if len(l.commands)-1 != l.at {
		return ""
	}
	l.at = -1
	return l.how
}

func (l *line) serve(near net.Conn) {
	defer near.Close()
	far, err := net.Dial("unix", l.far)
	for errors.Is(err, syscall.EAGAIN) { // it has not noticed the last one's end
		time.Sleep(time.Millisecond)
		far, err = net.Dial("unix", l.far)
	}
	if err != nil {
		return
	}
	defer far.Close()
	answers, hold := make(chan struct{}), make(chan struct{}) // hold is closed: the next answer is kept
	go func() {
		defer close(answers)
		for lines := bufio.NewReader(far); ; {
			text, err := lines.ReadBytes('\n')
			if err != nil {
				near.Close()
				return
			}
			var got struct{ ID *uint64 }
			select {
			case <-hold:
				if json.Unmarshal(text, &got) == nil && got.ID != nil { // it was done
					return
				}
			default:
				_, _ = near.Write(text)
			}
		}
	}()
	for lines := bufio.NewReader(near); ; {
		text, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var q struct{ Execute string }
		if json.Unmarshal(text, &q) != nil {
			return
		}
		how := l.next(q.Execute)
		switch how {
		case cutBefore:
			return
		case cutSilence:
			continue
		case cutInstead:
			_, _ = near.Write([]byte(l.instead))
			continue
		}
		if how != "" {
			close(hold)
		}
		if _, err := far.Write(text); err != nil {
			return
		}
		if how != "" {
			<-answers
			if how == cutKill {
				l.lost()
			}
			return
		}
	}
}

// step is something that an attacher does, and what is true when it has been done.
type step struct {
	name  string
	from  bool // the volume is in the machine before
	do    func(context.Context, *qemu.Attacher, attach.Request) error
	after attach.State
}

func steps() []step {
	limits := blockdev.Limits{WriteIOPS: 100}
	return []step{
		{"attach", false, func(ctx context.Context, a *qemu.Attacher, r attach.Request) error {
			r.Limits = limits
			return a.Attach(ctx, r)
		}, attach.StateAttached},
		{"limit", true, func(ctx context.Context, a *qemu.Attacher, r attach.Request) error {
			r.Limits = limits
			return a.Limit(ctx, r)
		}, attach.StateAttached},
		{"grow", true, func(ctx context.Context, a *qemu.Attacher, r attach.Request) error { return a.Resized(ctx, r) }, attach.StateAttached},
		{"detach", true, func(ctx context.Context, a *qemu.Attacher, r attach.Request) error { return a.Detach(ctx, r) }, attach.StateMissing},
	}
}

// TestCutAtEveryCommand: whatever command of a step is the last one that the daemon
// sent, done or not, the next life finishes the step, or takes it back; in the end
// nothing is left.
func TestCutAtEveryCommand(t *testing.T) {
	for name, start := range machines {
		for _, s := range steps() {
			t.Run(name+"/"+s.name, func(t *testing.T) { t.Parallel(); cutEverywhere(t, s, start) })
		}
	}
}

// machines are those that get volumes, each in its way.
var machines = map[string]func(*testing.T) *machine{
	"image":  func(t *testing.T) *machine { t.Helper(); return startMachine(t, controller...) },
	"worker": startServed,
}

func cutEverywhere(t *testing.T, s step, start func(*testing.T) *machine) {
	m := start(t)
	l := lineTo(t, m)
	a := attacher(t, m.dir)
	ctx := t.Context()
	target, err := a.Resolve(ctx, attach.Target{Type: qemu.Type, Socket: l.socket}, "")
	good(t, err)
	r := m.requestFor(target, 1)
	prepare := func() {
		t.Helper()
		l.plan(-1, "")
		if s.from {
			good(t, a.Attach(ctx, r))
		}
	}
	var commands []string
	for range 3 { // what it waits for it asks for again and again: the shortest counts
		prepare()
		l.plan(-1, "")
		good(t, s.do(ctx, a, r))
		if now := l.seen(); commands == nil || len(now) < len(commands) {
			commands = now
		}
		good(t, a.Detach(ctx, r))
	}
	unreached := 0
	for at, command := range commands {
		for _, how := range []string{cutBefore, cutAfter} {
			for _, back := range []bool{false, true} { // taken back by the next life
				name := fmt.Sprintf("%s, cut %s %s (%d)", s.name, how, command, at)
				prepare()
				l.plan(at, how)
				err := s.do(ctx, a, r)
				switch {
				case l.unreached():
					unreached++
					good(t, err)
				case err == nil:
					t.Errorf("%s: it is said to be done", name)
				}
				if !back {
					good(t, s.do(ctx, a, r))
					if state, err := a.Probe(ctx, r); err != nil || state != s.after {
						t.Errorf("%s: then %s, %v", name, state, err)
					}
					if s.after == attach.StateAttached && r.Endpoint.Kind == blockdev.File && m.open()[r.Endpoint.Path] == 0 {
						t.Errorf("%s: the image is not open", name)
					}
				}
				if err := a.Detach(ctx, r); err != nil {
					t.Errorf("%s: then detach: %v", name, err)
				}
				m.empty(name)
			}
		}
	}
	if unreached > len(commands) { // of four times as many
		t.Errorf("%d cuts were never reached", unreached)
	}
}

// TestMachineEndsAtEveryCommand: a machine that is killed in the middle of a step is
// gone, nothing else, and hinders no detach.
func TestMachineEndsAtEveryCommand(t *testing.T) {
	for name, start := range machines {
		for _, s := range steps() {
			t.Run(name+"/"+s.name, func(t *testing.T) { t.Parallel(); endEverywhere(t, s, start) })
		}
	}
}

func endEverywhere(t *testing.T, s step, start func(*testing.T) *machine) {
	for at := 0; ; at++ {
		m := start(t)
		l := lineTo(t, m)
		a := attacher(t, m.dir)
		target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: l.socket}, "")
		good(t, err)
		r := m.requestFor(target, 1)
		if s.from {
			good(t, a.Attach(t.Context(), r))
		}
		l.plan(at, cutKill)
		err = s.do(t.Context(), a, r)
		if at >= len(l.seen()) { // there is no such command
			good(t, err)
			break
		}
		name := fmt.Sprintf("%s, killed at %s (%d)", s.name, l.seen()[at], at)
		if s.name == "detach" {
			good(t, err)
		} else {
			is(t, name, err, blockdev.ErrGone, "")
		}
		if state, err := a.Probe(t.Context(), r); err != nil || state != attach.StateGone {
			t.Errorf("%s: then %s, %v", name, state, err)
		}
		good(t, a.Detach(t.Context(), r), a.Fence(t.Context(), r), a.AwaitEnd(t.Context(), target))
		is(t, name, a.Attach(t.Context(), r), blockdev.ErrGone, "")
		if r.Endpoint.Kind == blockdev.File { // a worker tells its guest
			is(t, name, a.Resized(t.Context(), r), blockdev.ErrGone, "")
		}
		is(t, name, a.Limit(t.Context(), r), blockdev.ErrGone, "")
	}
}

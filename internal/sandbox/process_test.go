package sandbox

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"holdfast/api"
)

// started is a process without a container.
func started(t *testing.T, s *processes) *process {
	t.Helper()
	p, err := s.add(time.Now(), api.Exec{Command: "x"}, "/")
	if err != nil {
		t.Fatal(err)
	}
	p.command = &command{}
	return p
}

func (p *process) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended, p.status = time.Now(), "completed"
}

func TestOutputKeepsOrder(t *testing.T) {
	var s processes
	p := started(t, &s)
	out, errOut := sink{&s, p, toOut}, sink{&s, p, toErr}
	for i := range 3 {
		fmt.Fprintf(out, "out %d\n", i)
		fmt.Fprintf(out, "more\n")
		fmt.Fprintf(errOut, "err %d\n", i)
	}
	got := p.show()
	if got.Logs != "out 0\nmore\nerr 0\nout 1\nmore\nerr 1\nout 2\nmore\nerr 2\n" || got.Stderr != "err 0\nerr 1\nerr 2\n" || !strings.HasPrefix(got.Stdout, "out 0\nmore\nout 1") {
		t.Errorf("%+v", got)
	}
	if len(p.said.runs) != 6 {
		t.Errorf("%d runs", len(p.said.runs))
	}
	for offset := range len(p.said.text) + 1 {
		var rest []byte
		for _, piece := range p.said.from(offset) {
			rest = append(rest, piece.text...)
		}
		if !bytes.Equal(rest, p.said.text[offset:]) {
			t.Errorf("from %d: %q", offset, rest)
		}
	}
}

func TestOutputIsBounded(t *testing.T) {
	var s processes
	big := bytes.Repeat([]byte("x"), 3<<20)
	p := started(t, &s)
	if n, err := (sink{&s, p, toOut}).Write(big); n != len(big) || err != nil {
		t.Fatal(n, err)
	}
	if got := p.show(); len(got.Stdout) != outputRoom || !got.Truncated {
		t.Errorf("%d bytes kept, truncated %v", len(got.Stdout), got.Truncated)
	}
	// Of many that run, all together no more than the total; none is forgotten.
	for range 20 {
		_, _ = sink{&s, started(t, &s), toOut}.Write(big)
	}
	if kept := s.kept.Load(); kept > outputTotal || len(s.list()) != 21 {
		t.Errorf("%d bytes of %d processes", kept, len(s.list()))
	}
	// Those that have ended make room.
	for _, p := range s.list() {
		p.finish()
	}
	last := started(t, &s)
	_, _ = sink{&s, last, toOut}.Write(big)
	if got := last.show(); len(got.Stdout) != outputRoom {
		t.Errorf("the newest has %d bytes", len(got.Stdout))
	}
	sum := 0
	for _, p := range s.list() {
		sum += len(p.said.text)
	}
	if int64(sum) != s.kept.Load() {
		t.Errorf("%d bytes, %d counted", sum, s.kept.Load())
	}
	// A byte to each stream in turn costs more than it says.
	p = started(t, &s)
	for range maxRuns {
		_, _ = sink{&s, p, toOut}.Write([]byte("o"))
		_, _ = sink{&s, p, toErr}.Write([]byte("e"))
	}
	if len(p.said.runs) > maxRuns || !p.show().Truncated {
		t.Errorf("%d runs", len(p.said.runs))
	}
}

func TestEndedProcessesAreForgotten(t *testing.T) {
	var s processes
	for range 3 * maxEnded {
		started(t, &s).finish()
		s.prune()
	}
	all := s.list()
	if len(all) != maxEnded || all[len(all)-1].shown.Name != fmt.Sprintf("proc-%d", 3*maxEnded) {
		t.Errorf("%d are left, the last is %s", len(all), all[len(all)-1].shown.Name)
	}
	for range maxRunning {
		started(t, &s)
	}
	if _, err := s.add(time.Now(), api.Exec{}, "/"); err == nil {
		t.Error("more than the most runs")
	}
}

package guest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"holdfast/internal/guest/agent"
)

// Line is one line of a script's output.
type Line struct {
	Text string
	At   time.Time // when it came out of the guest
}

// Script is a line of shell that runs in a guest while its owner does something
// else.
type Script struct {
	lines chan Line
	err   error // when lines is closed
	cut   context.CancelFunc
}

// mostLines is how many lines may wait to be read before the script has to.
const mostLines = 256

// Script starts a line of shell in the guest. Its end, or Close, ends it.
func (v *VM) Script(ctx context.Context, line string) *Script {
	ctx, cancel := context.WithTimeout(ctx, patience)
	s := &Script{lines: make(chan Line, mostLines), cut: cancel}
	go func() {
		defer cancel()
		s.err = v.agent.Run(ctx, agent.Command{Args: []string{"sh", "-c", line}}, nil, &splitter{to: s.lines}, nil)
		close(s.lines)
	}()
	return s
}

// Watch starts a script that waits for a disk with a serial and at least a size in
// bytes, as Disk does, prints its node, and then runs a line of shell, in which $D is
// the node. It returns when the guest is looking.
func (v *VM) Watch(ctx context.Context, serial string, size int64, then string) (*Script, error) {
	if then == "" {
		then = ":"
	}
	s := v.Script(ctx, fmt.Sprintf(`/init watch %s %d | { read begun; echo $begun; read D; echo $D; %s; }`, serial, max(size/512, 1), then))
	if _, err := s.Next(); err != nil {
		return nil, err
	}
	return s, nil
}

// Next waits for the next line. io.EOF when the script has ended well.
func (s *Script) Next() (Line, error) {
	line, ok := <-s.lines
	switch {
	case ok:
		return line, nil
	case s.err != nil:
		return Line{}, s.err
	}
	return Line{}, io.EOF
}

// Close ends the script if it runs.
func (s *Script) Close() { s.cut() }

// splitter makes lines of what is written to it.
type splitter struct {
	to   chan<- Line
	rest bytes.Buffer
}

func (w *splitter) Write(b []byte) (int, error) {
	now := time.Now()
	w.rest.Write(b)
	for {
		text, rest, found := strings.Cut(w.rest.String(), "\n")
		if !found {
			return len(b), nil
		}
		w.to <- Line{text, now}
		w.rest.Reset()
		w.rest.WriteString(rest)
	}
}

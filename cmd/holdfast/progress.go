package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"holdfast/internal/bytesize"
)

// progress is a bar on a terminal, and nothing elsewhere.
type progress struct {
	w       io.Writer // nil: silent
	what    string
	total   int64
	started time.Time
	drawn   time.Time
	last    int64
}

const (
	barWidth  = 30
	barEvery  = 100 * time.Millisecond
	clearLine = "\r\x1b[K"
)

func newProgress(w io.Writer, what string, total int64, quiet bool) *progress {
	if quiet || !isTerminal(w) {
		return &progress{}
	}
	return &progress{w: w, what: what, total: total, started: time.Now()}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// at draws the bar, not too often. Called from the goroutine that sends.
func (p *progress) at(n int64) {
	now := time.Now()
	if p.w == nil || (now.Sub(p.drawn) < barEvery && n < p.total) {
		return
	}
	p.drawn, p.last = now, n
	fmt.Fprint(p.w, clearLine+bar(p.what, n, p.total, now.Sub(p.started)))
}

// bar draws n of total bytes after a time. All bytes sent is not the end: the
// server builds the image before it answers.
func bar(what string, n, total int64, took time.Duration) string {
	filled := barWidth
	if total > 0 {
		filled = int(n * barWidth / total)
	}
	text := fmt.Sprintf("%s [%s%s] %s of %s", what, strings.Repeat("#", filled), strings.Repeat("-", barWidth-filled),
		bytesize.Human(n), bytesize.Human(total))
	if seconds := took.Seconds(); seconds > 0.5 {
		text += fmt.Sprintf(", %s/s", bytesize.Human(int64(float64(n)/seconds)))
	}
	if n >= total {
		text += ", building the image"
	}
	return text
}

// end leaves the line free for what comes.
func (p *progress) end() {
	if p.w != nil && p.last > 0 {
		fmt.Fprint(p.w, clearLine)
	}
}

package bench

import (
	"context"
	"fmt"
	"io"
	"time"

	"holdfast/internal/localdaemon"
)

// Setting is what every bench is given.
type Setting struct {
	Daemon string    // path of holdfastd
	Dir    string    // empty directory to work in
	Rounds int       // of each measure; 0: the bench's own number
	Quick  bool      // little of everything: a smoke test of the bench itself
	Log    io.Writer // progress
}

// Bench measures one part of the product beside what one would do instead.
type Bench interface {
	// Given is the bench's setting, to be filled in.
	Given() *Setting
	// Run measures everything and cleans up. The report is complete even when a goal
	// is missed; an error is a measure that could not be taken.
	Run(ctx context.Context) (Report, error)
}

// Given implements Bench.
func (s *Setting) Given() *Setting { return s }

func (s *Setting) say(format string, args ...any) { fmt.Fprintf(s.Log, format+"\n", args...) }

// idleSeconds is how long an idle daemon is watched.
const idleSeconds = 10

// idleCost is what a daemon took while nothing was asked of it.
type idleCost struct {
	ticks   int64 // of the clock, 100 a second
	seconds int
	percent float64 // of a core
	memory  float64 // resident, MiB
}

func (s *Setting) idleCost(ctx context.Context, d *localdaemon.Daemon) (idleCost, error) {
	c := idleCost{seconds: idleSeconds}
	if s.Quick {
		c.seconds = 1
	}
	before, err := d.CPUTicks()
	if err != nil {
		return c, err
	}
	select {
	case <-time.After(time.Duration(c.seconds) * time.Second):
	case <-ctx.Done():
		return c, ctx.Err()
	}
	after, err := d.CPUTicks()
	if err != nil {
		return c, err
	}
	c.ticks = after - before
	c.percent = float64(c.ticks) / float64(c.seconds)
	c.memory, err = d.MemoryMiB()
	return c, err
}

package cage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	gorunc "github.com/containerd/go-runc"

	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// ErrUnavailable means that no cage can be had. The tool was not started, here or
// anywhere else; the text says what is missing.
var ErrUnavailable = errors.New("no cage for filesystem tools")

// Options say what cages are made of.
type Options struct {
	// Name is in the name of every cage and of its control groups: a few letters
	// and digits that no other user of this package on this machine has.
	Name string
	// Dir is for what runc keeps, and the cages' empty root. It is made, is ours
	// alone, and must be reachable by everybody (the cages' root is nobody here).
	Dir string
	// Inside are the arguments with which this process's own program calls Inside.
	Inside []string
	// Warm is how many cages wait ready.
	Warm int
	// Most is how many may work at once; others wait. 0: 4.
	Most int
	// Memory bounds what a cage's processes and their page cache use, in bytes. 0: 1 GiB.
	Memory int64
	// Command is runc's name or path; empty: "runc".
	Command string
	// StartTime bounds the making of a cage, which takes some 50 ms. 0: 30 s.
	StartTime time.Duration
	Log       *slog.Logger
}

// Cages keeps cages ready and lends them. It is safe for concurrent use.
type Cages struct {
	o       Options
	runc    gorunc.Runc
	groups  groups
	root    rootfs
	nursery *os.File      // mount namespace in which runc starts
	working chan struct{} // one for each cage that has a job
	ready   chan *cage

	ctx  context.Context //nolint:containedctx // ends what is under way at Close
	stop context.CancelFunc
	work sync.WaitGroup

	mu       sync.Mutex
	starting int // cages under way to ready
	jobs     map[*job]struct{}
	closed   bool
}

// Open removes what a former process left, and makes sure that cages work here by
// making the first: ErrUnavailable, with the reason, where they do not. That the
// first takes too long proves nothing: it is logged, and the next job tries again.
func Open(ctx context.Context, o Options) (*Cages, error) {
	if o.Most == 0 {
		o.Most = 4
	}
	if o.Memory == 0 {
		o.Memory = 1 << 30
	}
	if o.Command == "" {
		o.Command = "runc"
	}
	if o.StartTime == 0 {
		o.StartTime = 30 * time.Second
	}
	if missing := Missing(o.Command); len(missing) > 0 {
		return nil, fmt.Errorf("%w: %s", ErrUnavailable, missing[0])
	}
	command, err := run.Look(o.Command)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	c := &Cages{o: o, working: make(chan struct{}, o.Most), ready: make(chan *cage, max(o.Warm, 1)), jobs: map[*job]struct{}{}}
	c.runc = gorunc.Runc{Command: command, Root: c.path("state")}
	if err := Remove(ctx, o); err != nil {
		return nil, err
	}
	if c.groups, err = findGroups(); err != nil {
		return nil, fmt.Errorf("%w: control groups: %w", ErrUnavailable, err)
	}
	if c.root, err = makeRoot(c.path("root")); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if c.nursery, err = sys.NewMountNamespace(c.needs); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	c.ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	first, err := c.start(ctx, device{})
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		o.Log.Error("the first cage could not be made in time", "cause", err)
		return c, nil
	case err != nil:
		return nil, errors.Join(err, c.Close())
	case o.Warm == 0:
		return c, c.end(first)
	}
	c.ready <- first
	c.refill()
	return c, nil
}

// Limits tells which bounds the control groups of this machine do not give: then
// only each process is bounded for itself.
func (c *Cages) Limits() (missing []string) { return c.groups.missing() }

func (c *Cages) path(name string) string { return filepath.Join(c.o.Dir, name) }

// needs tells whether runc needs what is mounted at a place to start a cage.
func (c *Cages) needs(place string) bool {
	if place == "/proc" || place == "/sys" || place == "/dev" || below(place, cgroupRoot) {
		return true
	}
	needed := append([]string{c.o.Dir, c.runc.Command}, c.root.shown...)
	if program, err := os.Readlink(ownProgram); err == nil {
		needed = append(needed, program)
	}
	return slices.ContainsFunc(needed, func(path string) bool { return below(path, place) })
}

// below reports whether path is dir or lies below it.
func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// get gives a cage that waits, or a new one, for one job.
func (c *Cages) get(ctx context.Context) (*cage, error) {
	for {
		select {
		case k := <-c.ready:
			if k.alive() {
				return k, nil
			}
			c.o.Log.Warn("a waiting cage has ended by itself", "cage", k.id)
			c.later(func() error { return c.end(k) })
		default:
			return c.start(ctx, device{})
		}
	}
}

// refill starts cages, in the background, until enough wait.
func (c *Cages) refill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.closed && len(c.ready)+c.starting < c.o.Warm {
		c.starting++
		c.work.Go(func() {
			k, err := c.start(context.WithoutCancel(c.ctx), device{}) // Close waits: a start cut off leaves more to be removed
			c.mu.Lock()
			defer c.mu.Unlock()
			c.starting--
			switch {
			case err != nil:
				c.o.Log.Warn("no cage waits: the next filesystem tool starts its own", "cause", err)
			case c.closed:
				c.log(c.end(k))
			default:
				c.ready <- k
			}
		})
	}
}

// later does something in the background, which Close waits for.
func (c *Cages) later(do func() error) {
	c.work.Go(func() { c.log(do()) })
}

func (c *Cages) log(err error) {
	if err != nil {
		c.o.Log.Error("a cage could not be removed: the next start does it", "cause", err)
	}
}

// Close ends all cages, jobs as well, and removes everything.
func (c *Cages) Close() error {
	c.mu.Lock()
	c.closed = true
	jobs := slices.Collect(maps.Keys(c.jobs))
	c.mu.Unlock()
	c.stop()
	var errs []error
	for _, j := range jobs {
		errs = append(errs, j.Close())
	}
	c.work.Wait()
	for {
		select {
		case k := <-c.ready:
			errs = append(errs, c.end(k))
			continue
		default:
		}
		break
	}
	errs = append(errs, c.nursery.Close())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(c.o.Dir)
}

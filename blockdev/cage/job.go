package cage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"holdfast/blockdev/filesystem"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

var _ filesystem.Cages = (*Cages)(nil)

// job is one image in one cage.
type job struct {
	cages *Cages
	cage  *cage
	image string // where tools find it
	size  int64

	mu     sync.Mutex // one command after the other
	closed bool
}

// Enter takes an image, a file or a block device, into a cage. It waits while as
// many as may be are at work. ErrUnavailable when no cage can be had.
func (c *Cages) Enter(ctx context.Context, image string) (filesystem.Cage, error) {
	select {
	case c.working <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.ctx.Done():
		return nil, errClosed
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		<-c.working
		return nil, errClosed
	}
	c.work.Add(1) // Close waits for what follows
	c.mu.Unlock()
	defer c.work.Done()
	j, err := c.enter(ctx, image)
	if err != nil {
		<-c.working
		return nil, err
	}
	c.mu.Lock()
	c.jobs[j] = struct{}{}
	closed := c.closed
	c.mu.Unlock()
	if closed {
		return nil, errors.Join(errClosed, j.Close())
	}
	return j, nil
}

var errClosed = fmt.Errorf("%w: the daemon stops", ErrUnavailable)

func (c *Cages) enter(ctx context.Context, image string) (*job, error) {
	what, err := lookAt(image)
	if err != nil {
		return nil, err
	}
	var k *cage
	if what.block {
		k, err = c.start(ctx, what) // a control group that names the device cannot wait for it
	} else {
		k, err = c.get(ctx)
	}
	if err != nil {
		return nil, err
	}
	inside, err := k.take(image, what)
	if err != nil {
		return nil, errors.Join(err, k.quit(), c.forget(k))
	}
	return &job{cages: c, cage: k, image: inside, size: what.size}, nil
}

// Image is where tools find the image.
func (j *job) Image() string { return j.image }

// Close ends the cage. When it returns nil nothing in it can touch the image any
// more; what is left to be removed is removed in the background.
func (j *job) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return nil
	}
	j.closed = true
	err := j.cage.quit()
	<-j.cages.working
	j.cages.later(func() error {
		select { // the caller's next steps come first
		case <-time.After(breath):
		case <-j.cages.ctx.Done():
		}
		j.cages.refill()
		return j.cages.forget(j.cage)
	})
	j.cages.mu.Lock() // not before: Close waits for what it finds, or for what was begun
	delete(j.cages.jobs, j)
	j.cages.mu.Unlock()
	return err
}

// breath is how long the replacement of a cage waits, so as not to compete with
// what follows the tools: two runs of runc are more work than most jobs.
const breath = 25 * time.Millisecond

// patience is how long a tool may work on an image of size bytes: damaged
// structures can keep one busy for ever.
func patience(size int64) time.Duration {
	return 2*time.Minute + time.Duration(size>>28)*time.Second
}

// Run runs a tool as run.Run does, in the cage: of c, Args, Timeout and OKCodes
// count, and there is a time-out by the image's size besides. At most 64 KiB of each
// output are kept. When ctx ends or the time is up the cage is killed, and nothing
// can run in it any more.
func (j *job) Run(ctx context.Context, c run.Cmd) (run.Result, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	timeout := patience(j.size)
	if c.Timeout > 0 {
		timeout = min(timeout, c.Timeout)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	defer context.AfterFunc(j.cages.ctx, cancel)()
	killed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { killed <- sys.KillProcess(j.cage.process) })
	// The one inside is for a tool that outlives this process's interest by little.
	answer, err := j.cage.ask(order{Args: c.Args, Timeout: timeout + time.Minute})
	if !stop() {
		err = errors.Join(ctx.Err(), <-killed)
	}
	res := run.Result{Stdout: answer.Stdout, Stderr: answer.Stderr, Code: answer.Code, Truncated: answer.Truncated}
	if err != nil {
		res.Code = -1
	}
	return res, j.explain(c, answer, err)
}

// explain makes the error of a command, in the form that run.Run gives.
func (j *job) explain(c run.Cmd, r reply, err error) error {
	switch {
	case err != nil:
		r.Code = -1
		if !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("its cage has ended: %w", err)
		}
	case r.Missing:
		err = fmt.Errorf("%w in the cage", run.ErrNotFound)
	case r.Problem != "":
		err = errors.New(printable(r.Problem))
	case r.Code == 0:
		return nil
	default:
		for _, ok := range c.OKCodes {
			if r.Code == ok {
				return nil
			}
		}
		err = fmt.Errorf("exit status %d", r.Code)
	}
	if r.Code < 0 && j.cage.outOfMemory() {
		err = fmt.Errorf("it needs more memory than the %d MiB of a cage: %w", j.cages.o.Memory>>20, err)
	}
	text := printable(strings.TrimSpace(string(r.Stderr)))
	if len(text) > 2048 {
		text = text[:2048] + " ..."
	}
	return &run.Error{Args: c.Args, Code: r.Code, Stderr: text, Err: err}
}

// printable keeps what a hijacked tool may have written from acting on a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// greeted waits for the first sign of the process inside.
func (k *cage) greeted() error {
	b := make([]byte, 1)
	if _, err := io.ReadFull(k.socket, b); err != nil {
		return err
	}
	if b[0] != greeting {
		return fmt.Errorf("unexpected greeting %q", b)
	}
	return k.socket.SetReadDeadline(time.Time{})
}

// ask sends an order and waits for the reply, of which no more than a bounded
// number of bytes is read.
func (k *cage) ask(o order) (r reply, err error) {
	text, err := json.Marshal(o)
	if err != nil {
		return r, err
	}
	if _, err := k.socket.Write(text); err != nil {
		return r, err
	}
	err = json.NewDecoder(io.LimitReader(k.socket, replyLimit)).Decode(&r)
	return r, err
}

// device is what Enter found an image to be.
type device struct {
	block  bool
	number uint64 // of the block device
	size   int64  // bytes
}

func lookAt(image string) (device, error) {
	f, err := os.OpenFile(image, os.O_RDONLY, 0)
	if err != nil {
		return device{}, err
	}
	defer f.Close()
	place, err := sys.PlaceOf(f)
	if err != nil {
		return device{}, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	return device{block: place.IsBlock(), number: place.RDevice, size: size}, err
}

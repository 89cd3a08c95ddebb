package filesystem

import (
	"context"
	"errors"

	"holdfast/internal/run"
)

// Cages give tools a place in which bytes that a tenant may have shaped can do no
// harm. blockdev/cage has them.
type Cages interface {
	// Enter takes one image, a file or a block device, into a cage of its own.
	Enter(ctx context.Context, image string) (Cage, error)
}

// Cage is such a place. Close ends all that runs in it: after that nothing in it
// can touch the image.
type Cage interface {
	// Image is the image's path for tools.
	Image() string
	// Run runs a tool like run.Run; of c, Args, Timeout and OKCodes count.
	Run(ctx context.Context, c run.Cmd) (run.Result, error)
	Close() error
}

// workplace is where the tools of one operation run: a cage that is entered when
// the first of them is needed, or this host where there are no cages.
type workplace struct {
	x    Tools
	path string // of the image, here
	cage Cage
}

func (x Tools) at(path string) *workplace { return &workplace{x: x, path: path} }

// run runs a tool with the image as its last argument, or before those of after.
func (w *workplace) run(ctx context.Context, ok []int, tool []string, after ...string) error {
	cmd := func(image string) run.Cmd {
		args := append(append(append([]string{}, tool...), image), after...)
		return run.Cmd{Args: args, Timeout: w.x.CheckTimeout, OKCodes: ok}
	}
	if w.x.cages == nil {
		_, err := run.Run(ctx, cmd(w.path))
		return err
	}
	if w.cage == nil {
		var err error
		if w.cage, err = w.x.cages.Enter(ctx, w.path); err != nil {
			return err
		}
	}
	_, err := w.cage.Run(ctx, cmd(w.cage.Image()))
	return err
}

// leave ends the cage; what it says is joined to the operation's error.
func (w *workplace) leave(err error) error {
	if w.cage == nil {
		return err
	}
	return errors.Join(err, w.cage.Close())
}

package cage

import (
	"context"
	"io"
	"testing"

	"holdfast/internal/sys"
)

// Settle waits until nothing is done in the background.
func (c *Cages) Settle() { c.work.Wait() }

// Waiting tells the processes of the cages that wait, as this host numbers them.
func (c *Cages) Waiting() int { return len(c.ready) }

// KillWaiting kills a cage that waits, and leaves it where it is.
func (c *Cages) KillWaiting() error {
	k := <-c.ready
	defer func() { c.ready <- k }()
	if err := sys.KillProcess(k.process); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), endTime)
	defer cancel()
	return sys.AwaitEnd(ctx, k.process)
}

// Nursery is the table of mounts of the namespace in which cages are started.
func (c *Cages) Nursery(t testing.TB) (table string) {
	t.Helper()
	err := sys.InMountNamespace(c.nursery, func(in sys.Inside) error {
		f, err := in.Mountinfo()
		if err != nil {
			return err
		}
		defer f.Close()
		text, err := io.ReadAll(f)
		table = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

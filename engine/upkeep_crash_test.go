package engine

import (
	"context"
	"errors"
	"time"
)

// upkeepLife is what happens to volumes while they are in use: freezes that end
// in each way, trims with and without a writer.
func upkeepLife() []op {
	return []op{
		createOp("a", "", "xfs", 300),
		createOp("b2", "", "ext4", 16),
		attachOp("a", "runc", "box", false),
		freezeOp("a", "box"),
		resizeOp("a", 400), // its filesystem grows when it is thawed
		thawOp("a"),
		trimOp("a"),
		freezeOp("a", "box"),
		detachOp("a", "box"), // thaws
		trimOp("a"),
		deleteOp("a"),
	}
}

// freezeOp freezes a volume in a container, which is attached again if it went
// with the power.
func freezeOp(name, box string) op {
	return op{
		name: "freeze " + name,
		do: func(w *world) error {
			if v, err := w.engine.Volume(space, name); err == nil && len(v.Attachments) == 0 {
				if err := attachOp(name, "runc", box, false).do(w); err != nil {
					return err
				}
			}
			_, err := w.engine.FreezeVolume(context.Background(), space, name, time.Minute, "")
			return err
		},
		want: func(*model) {},
	}
}

func thawOp(name string) op {
	return op{
		name: "thaw " + name,
		do: func(w *world) error {
			_, err := w.engine.ThawVolume(context.Background(), space, name, "")
			return err
		},
		want: func(*model) {},
	}
}

func trimOp(name string) op {
	return op{
		name: "trim " + name,
		do: func(w *world) error {
			r, err := w.engine.TrimVolume(context.Background(), space, name)
			if err == nil && !r.Complete {
				err = errors.New(r.Reason)
			}
			return err
		},
		want: func(*model) {},
	}
}

package engine

import (
	"context"
	"errors"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// upkeepLife is what happens to volumes while they are in use: freezes that end
// in each way, trims with and without a writer.
func upkeepLife() []op {
	return []op{
		createOp("a", "", "xfs", 300),
		createOp("b2", "", "ext4", 16),
		limitedOp("a", "runc", "box"),
		limitsOp("a", 200),
		captureOp("a", false),
		captureOp("a", true),
		freezeOp("a", "box"),
		captureOp("a", false),
		resizeOp("a", 400), // its filesystem grows when it is thawed
		thawOp("a"),
		trimOp("a"),
		freezeOp("a", "box"),
		detachOp("a", "box"), // thaws
		trimOp("a"),
		captureOp("a", false),
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

// limitedOp attaches with limits.
func limitedOp(name, kind, box string) op {
	o := attachOp(name, kind, box, false)
	r := AttachVolume{Holder: "sandbox:" + box, Target: attach.Target{Type: kind, Container: box}, Limits: blockdev.Limits{ReadIOPS: 100}}
	if kind == "runc" {
		r.MountPath = "/data"
	}
	o.do = func(w *world) error {
		_, err := w.engine.Attach(context.Background(), space, name, r)
		return err
	}
	return o
}

// limitsOp changes them.
func limitsOp(name string, iops int64) op {
	return op{
		name: "limits of " + name,
		do: func(w *world) error {
			v, err := w.engine.Volume(space, name)
			if err != nil || len(v.Attachments) == 0 { // its sandbox went with the power
				return err
			}
			_, err = w.engine.SetLimits(context.Background(), space, name, v.Attachments[0].ID, blockdev.Limits{WriteIOPS: iops}, "")
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

func captureOp(name string, journal bool) op {
	return op{
		name: "capture " + name,
		do: func(w *world) error {
			w.journal = journal
			_, err := w.engine.CaptureVolume(context.Background(), space, name, CaptureVolume{Template: "made"})
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

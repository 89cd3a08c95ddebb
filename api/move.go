package api

import (
	"cmp"

	"holdfast/engine"
)

// MoveRequest is the body of POST.
type MoveRequest struct {
	Pool string `json:"pool"` // where to
}

// Move is how far a volume is on its way to another pool. Sizes are in bytes.
type Move struct {
	From      string `json:"from"`
	To        string `json:"to"`
	Phase     string `json:"phase"`
	Size      int64  `json:"size"`   // of the device
	Done      int64  `json:"done"`   // of it, that is durable in the new pool
	Copied    int64  `json:"copied"` // of that, data
	Failure   string `json:"failure,omitempty"`
	StartedAt string `json:"startedAt"`
}

// moveVolume begins to move a volume to another pool, or takes that back.
func moveVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	var b MoveRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	v, err := c.s.o.Engine.MoveVolume(c.r.Context(), c.workspace, name, b.Pool, c.principal.actor())
	if err != nil {
		return err
	}
	return c.volume(v)
}

func moveBody(m *engine.Move) *Move {
	if m == nil {
		return nil
	}
	return &Move{
		From: cmp.Or(m.From, engine.PolicyFirst), To: cmp.Or(m.To, engine.PolicyFirst), Phase: string(m.Phase),
		Size: m.Size, Done: m.Done, Copied: m.Copied, Failure: m.Failure, StartedAt: stamp(m.StartedAt),
	}
}

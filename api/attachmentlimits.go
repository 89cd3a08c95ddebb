package api

import (
	"holdfast/blockdev"
	"holdfast/engine"
)

// RateLimits bound what an attachment reads and writes, per second. 0 or absent
// is no limit.
type RateLimits struct {
	ReadIOPS   int64 `json:"readIops,omitempty"`
	WriteIOPS  int64 `json:"writeIops,omitempty"`
	ReadBytes  int64 `json:"readBytesPerSecond,omitempty"`
	WriteBytes int64 `json:"writeBytesPerSecond,omitempty"`
}

// Enforcement says how limits hold on this host, and for what they do not.
type Enforcement struct {
	Mechanism string   `json:"mechanism"`
	Gaps      []string `json:"gaps"`
}

func (l RateLimits) limits() blockdev.Limits { return blockdev.Limits(l) }

func limitsBody(l blockdev.Limits) *RateLimits {
	if l.None() {
		return nil
	}
	b := RateLimits(l)
	return &b
}

// attachment is attachmentBody with how its limits hold, and what is left to a guest.
func (c *call) attachment(a engine.Attachment) Attachment {
	b := attachmentBody(a)
	b.Remains = c.s.o.Engine.Remains(a)
	if !a.Limits.None() {
		e := c.s.o.Engine.Enforcement(a)
		b.Enforcement = &Enforcement{Mechanism: e.Mechanism, Gaps: e.Gaps}
		if e.Gaps == nil {
			b.Enforcement.Gaps = []string{}
		}
	}
	return b
}

// setLimits replaces an attachment's limits while it is in use.
func setLimits(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	if err := c.mayAttach(); err != nil {
		return err
	}
	var b RateLimits
	if err := c.decode(&b); err != nil {
		return err
	}
	a, err := c.s.o.Engine.SetLimits(c.r.Context(), c.workspace, name, c.r.PathValue("id"), b.limits(), c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(c.attachment(a))
}

// mayAttach refuses those to whom the host's targets, and what the operator
// allows there, do not belong.
func (c *call) mayAttach() error {
	if !c.s.o.TenantsAttach && !c.principal.ControlPlane {
		return refuse(ErrForbidden, "attaching needs a control-plane key here: targets belong to the host, not to a workspace")
	}
	return nil
}

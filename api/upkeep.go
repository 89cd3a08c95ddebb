package api

import (
	"bytes"
	"context"
	"net/http"
	"time"

	"holdfast/blockdev"
	"holdfast/engine"
)

// Stats is how full a volume is and what it is doing. Sizes are in bytes.
type Stats struct {
	State       string      `json:"state"` // unmounted, mounted, frozen
	FrozenUntil string      `json:"frozenUntil,omitempty"`
	Device      int64       `json:"device"`
	Allocated   int64       `json:"allocated"`
	Shared      int64       `json:"shared"`
	Filesystem  *Usage      `json:"filesystem,omitempty"`
	Unknown     string      `json:"unknown,omitempty"` // why there is no filesystem here
	IO          *IOCounters `json:"io,omitempty"`      // since the device was opened; absent while there is none
}

// Usage is what a filesystem says of itself.
type Usage struct {
	Source     string `json:"source"` // kernel, superblock
	Total      int64  `json:"total"`
	Used       int64  `json:"used"`
	Free       int64  `json:"free"`
	Inodes     int64  `json:"inodes"`
	UsedInodes int64  `json:"usedInodes"`
	FreeInodes int64  `json:"freeInodes"`
	Unclean    bool   `json:"unclean,omitempty"`
}

// IOCounters are what went through a volume's device.
type IOCounters struct {
	Since        string `json:"since"`
	Reads        int64  `json:"reads"`
	ReadBytes    int64  `json:"readBytes"`
	Writes       int64  `json:"writes"`
	WriteBytes   int64  `json:"writeBytes"`
	Discards     int64  `json:"discards"`
	DiscardBytes int64  `json:"discardBytes"`
	Flushes      int64  `json:"flushes"`
}

// TrimResult is what a trim did, in bytes.
type TrimResult struct {
	Freed     int64  `json:"freed"`
	Discarded int64  `json:"discarded"`
	Complete  bool   `json:"complete"`
	Reason    string `json:"reason,omitempty"`
}

// FreezeState is the answer to freeze and thaw.
type FreezeState struct {
	Frozen    bool   `json:"frozen"`
	Until     string `json:"until,omitempty"`
	WasFrozen *bool  `json:"wasFrozen,omitempty"` // of thaw: false when the freeze had ended by itself
}

// FreezeRequest is the body of freeze; it may be left out.
type FreezeRequest struct {
	Timeout string `json:"timeout"` // as "30s"
}

func getStats(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	s, err := c.s.o.Engine.Stats(c.r.Context(), c.workspace, name)
	if err != nil {
		return err
	}
	return c.json(statsBody(s))
}

func statsBody(s engine.Stats) Stats {
	b := Stats{State: string(s.State), Device: s.Device, Allocated: s.Allocated, Shared: s.Shared, Unknown: s.Unknown}
	if s.Freeze != nil {
		b.FrozenUntil = stamp(s.Freeze.Until)
	}
	if u := s.Filesystem; u != nil {
		b.Filesystem = &Usage{
			Source: "kernel", Total: u.Total, Used: u.Used, Free: u.Free,
			Inodes: u.Inodes, UsedInodes: u.UsedInodes, FreeInodes: u.FreeInodes, Unclean: u.Unclean,
		}
		if s.State == engine.Unmounted {
			b.Filesystem.Source = "superblock"
		}
	}
	b.IO = countersBody(s.IO)
	return b
}

func countersBody(n *blockdev.Counters) *IOCounters {
	if n == nil {
		return nil
	}
	return &IOCounters{
		Since: stamp(n.Since), Reads: n.Reads, ReadBytes: n.ReadBytes, Writes: n.Writes, WriteBytes: n.WriteBytes,
		Discards: n.Discards, DiscardBytes: n.DiscardBytes, Flushes: n.Flushes,
	}
}

func trimVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	r, err := c.s.o.Engine.TrimVolume(c.r.Context(), c.workspace, name)
	if err != nil {
		return err
	}
	return c.json(TrimResult{Freed: r.Freed, Discarded: r.Discarded, Complete: r.Complete, Reason: r.Reason})
}

func freezeVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	var b FreezeRequest
	if err := c.decodeOptional(&b); err != nil {
		return err
	}
	var timeout time.Duration // the engine's default
	if b.Timeout != "" {
		if timeout, err = time.ParseDuration(b.Timeout); err != nil || timeout <= 0 {
			return invalid("timeout", "must be a time such as 30s, not %s", clip(b.Timeout, 32))
		}
	}
	f, err := c.s.o.Engine.FreezeVolume(c.r.Context(), c.workspace, name, timeout, c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(FreezeState{Frozen: true, Until: stamp(f.Until)})
}

func thawVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	was, err := c.s.o.Engine.ThawVolume(c.r.Context(), c.workspace, name, c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(FreezeState{WasFrozen: &was})
}

// decodeOptional is decode for a body that may be left out.
func (c *call) decodeOptional(v any) error {
	b, err := c.readBody()
	if err != nil {
		return err
	}
	switch b = bytes.TrimSpace(b); {
	case len(b) == 0:
		return nil
	case b[0] != '{':
		return invalid("body", "must be a JSON object")
	}
	return unmarshal(b, v)
}

// CaptureRequest is the body of capture.
type CaptureRequest struct {
	Template string `json:"template"`
	Version  string `json:"version"`
}

// Captured is a version made of a volume, and how that went.
type Captured struct {
	Version            TemplateVersion `json:"version"`
	Online             bool            `json:"online"`             // the volume was attached
	FrozenMilliseconds float64         `json:"frozenMilliseconds"` // how long its writers were held
	SkippedDevices     int64           `json:"skippedDevices"`
	SkippedPipes       int64           `json:"skippedPipes"` // pipes and sockets
}

// captureVolume makes a template version of what a volume holds. It answers when
// the version is READY.
func captureVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	_ = http.NewResponseController(c.w.ResponseWriter).SetReadDeadline(time.Now().Add(c.s.o.Limits.Request))
	var b CaptureRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	if !validName(b.Template) {
		return invalid("template", nameRule)
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), c.s.o.Limits.Import)
	defer cancel()
	r, err := c.s.o.Engine.CaptureVolume(ctx, c.workspace, name, engine.CaptureVolume{Template: b.Template, Version: b.Version, Actor: c.principal.actor()})
	if err != nil {
		return err
	}
	c.resource = name + " as " + r.Revision.Template + ":" + r.Revision.Name
	c.extendWrite()
	return c.json(Captured{
		Version: versionBody(r.Revision), Online: r.Online, FrozenMilliseconds: float64(r.Frozen.Microseconds()) / 1000,
		SkippedDevices: r.Skipped.Devices, SkippedPipes: r.Skipped.Pipes,
	})
}

package client

import (
	"context"
	"time"
)

// Stats is how full a volume is and what it is doing. Sizes are in bytes.
type Stats struct {
	State       string      `json:"state"` // unmounted, mounted, frozen
	FrozenUntil time.Time   `json:"frozenUntil,omitzero"`
	Device      int64       `json:"device"`
	Allocated   int64       `json:"allocated"`
	Shared      int64       `json:"shared"`
	Filesystem  *Usage      `json:"filesystem,omitempty"` // nil: Unknown says why
	Unknown     string      `json:"unknown,omitempty"`
	IO          *IOCounters `json:"io,omitempty"` // since the device was opened; nil while there is none
}

// Usage is what a filesystem says of itself.
type Usage struct {
	Source     string `json:"source"` // kernel, superblock
	Total      int64  `json:"total"`
	Used       int64  `json:"used"`
	Free       int64  `json:"free"`
	Inodes     int64  `json:"inodes"` // 0: there is no such number (btrfs)
	UsedInodes int64  `json:"usedInodes"`
	FreeInodes int64  `json:"freeInodes"`
	Unclean    bool   `json:"unclean,omitempty"` // not unmounted: the numbers are those of before its recovery
}

// IOCounters are what went through a volume's device.
type IOCounters struct {
	Since        time.Time `json:"since"`
	Reads        int64     `json:"reads"`
	ReadBytes    int64     `json:"readBytes"`
	Writes       int64     `json:"writes"`
	WriteBytes   int64     `json:"writeBytes"`
	Discards     int64     `json:"discards"`
	DiscardBytes int64     `json:"discardBytes"`
	Flushes      int64     `json:"flushes"`
}

// Trimmed is what a trim did, in bytes.
type Trimmed struct {
	Freed     int64  `json:"freed"`     // that the pool got back
	Discarded int64  `json:"discarded"` // that the filesystem says it gave up
	Complete  bool   `json:"complete"`
	Reason    string `json:"reason,omitempty"` // why it is not complete
}

// FreezeState is whether a volume is frozen.
type FreezeState struct {
	Frozen    bool      `json:"frozen"`
	Until     time.Time `json:"until,omitzero"`
	WasFrozen bool      `json:"wasFrozen,omitempty"` // of Thaw: false when the freeze had ended by itself
}

// Stats tells how full a volume is. Nothing is mounted for it.
func (c *Client) Stats(ctx context.Context, volume string) (Stats, error) {
	var out Stats
	err := c.do(ctx, call{method: "GET", path: []string{"volumes", volume, "stats"}}, &out)
	return out, err
}

// Trim gives the space of a volume's free blocks back to the pool.
func (c *Client) Trim(ctx context.Context, volume string) (Trimmed, error) {
	var out Trimmed
	err := c.do(ctx, call{method: "POST", path: []string{"volumes", volume, "trim"}}, &out)
	return out, err
}

// Freeze holds all writes to an attached volume for at most timeout (0: the
// server's default), or until Thaw.
func (c *Client) Freeze(ctx context.Context, volume string, timeout time.Duration) (FreezeState, error) {
	body := map[string]string{}
	if timeout > 0 {
		body["timeout"] = timeout.String()
	}
	var out FreezeState
	err := c.do(ctx, call{method: "POST", path: []string{"volumes", volume, "freeze"}, body: body}, &out)
	return out, err
}

// Thaw ends a freeze; none is success.
func (c *Client) Thaw(ctx context.Context, volume string) (FreezeState, error) {
	var out FreezeState
	err := c.do(ctx, call{method: "POST", path: []string{"volumes", volume, "thaw"}}, &out)
	return out, err
}

// Captured is a template version made of a volume, and how that went.
type Captured struct {
	Version            TemplateVersion `json:"version"`
	Online             bool            `json:"online"`             // the volume was attached
	FrozenMilliseconds float64         `json:"frozenMilliseconds"` // how long its writers were held
	SkippedDevices     int64           `json:"skippedDevices"`
	SkippedPipes       int64           `json:"skippedPipes"` // pipes and sockets
}

// Capture makes a version of a template of what a volume holds, also while it is
// in use. An empty version is named by its number. It returns when the version is
// usable and durable.
func (c *Client) Capture(ctx context.Context, volume, template, version string) (Captured, error) {
	body := map[string]string{"template": template}
	if version != "" {
		body["version"] = version
	}
	var out Captured
	err := c.do(ctx, call{method: "POST", path: []string{"volumes", volume, "capture"}, body: body}, &out)
	return out, err
}

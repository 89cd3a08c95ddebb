package client

import (
	"context"
	"time"
)

// VolumeIO is what goes through a volume, and what it waits for.
type VolumeIO struct {
	Name     string      `json:"name"`
	Counters *IOCounters `json:"counters,omitempty"` // nil while it has no device, or nobody counts
	Worker   *Worker     `json:"worker,omitempty"`   // nil where none serves it
	Waits    []Wait      `json:"waits"`              // now, the worst first; never empty
}

// Wait is something that a volume waits for.
type Wait struct {
	Cause    string `json:"cause"` // nothing, unknown, step, freeze, failed, hydration, throttle, flush, device
	Requests int64  `json:"requests,omitempty"`
	Text     string `json:"text"`
}

// Worker is how the process does that serves a volume.
type Worker struct {
	Since     time.Time            `json:"since"`
	Kind      string               `json:"kind"` // vhost-user, nbd
	Clients   int                  `json:"clients"`
	Inside    int64                `json:"inside"` // requests
	Failed    bool                 `json:"failed"` // a flush has failed: no write is acknowledged
	Limits    *RateLimits          `json:"limits,omitempty"`
	Requests  map[string]Served    `json:"requests"` // by kind: read, write, flush, discard, zero
	Waiting   map[string]WaitingOn `json:"waiting"`  // by cause: device, flush, throttle, hydration
	Hydration *WorkerHydration     `json:"hydration,omitempty"`
}

// Served is what was served of one kind since the worker began.
type Served struct {
	Requests uint64  `json:"requests"`
	Errors   uint64  `json:"errors"`
	Bytes    uint64  `json:"bytes"`
	Seconds  float64 `json:"seconds"` // the sum of the latencies
	P50      float64 `json:"p50Microseconds"`
	P99      float64 `json:"p99Microseconds"`
	P999     float64 `json:"p999Microseconds"`
}

// WaitingOn is how much was waited for one cause.
type WaitingOn struct {
	Now     int64   `json:"now"`     // requests
	Seconds float64 `json:"seconds"` // of all requests that wait no more, together
}

// WorkerHydration is how far a volume is that still has layers or a base below it.
type WorkerHydration struct {
	Held         int64     `json:"held"` // bytes
	Size         int64     `json:"size"` // bytes
	Copied       int64     `json:"copied"`
	SealedLayers int       `json:"sealedLayers"`
	FailingSince time.Time `json:"failingSince,omitzero"` // of the base
	Tries        int64     `json:"tries,omitempty"`
	Reason       string    `json:"reason,omitempty"` // operators are told
}

// IO tells what goes through a volume, and what it waits for.
func (c *Client) IO(ctx context.Context, volume string) (VolumeIO, error) {
	var out VolumeIO
	err := c.do(ctx, call{method: "GET", path: []string{"volumes", volume, "io"}}, &out)
	return out, err
}

// IOInUse tells what goes through the volumes that are attached, in the order of
// their names; more tells that there are others.
func (c *Client) IOInUse(ctx context.Context) (all []VolumeIO, more bool, err error) {
	var out struct {
		Data []VolumeIO `json:"data"`
		More bool       `json:"more"`
	}
	err = c.do(ctx, call{method: "GET", path: []string{"io"}}, &out)
	return out.Data, out.More, err
}

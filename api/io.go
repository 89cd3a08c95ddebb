package api

import (
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/meter"
	"holdfast/engine"
)

// mostInUse bounds how many volumes one answer tells of.
const mostInUse = 1000

// VolumeIO is what goes through a volume, and what it waits for.
type VolumeIO struct {
	Name     string      `json:"name"`
	Counters *IOCounters `json:"counters,omitempty"` // absent while it has no device, or nobody counts
	Worker   *Worker     `json:"worker,omitempty"`   // absent where none serves it
	Waits    []Wait      `json:"waits"`              // now, the worst first; never empty
}

// Wait is something that a volume waits for.
type Wait struct {
	Cause    string `json:"cause"`
	Requests int64  `json:"requests,omitempty"`
	Text     string `json:"text"`
}

// Worker is how the process does that serves a volume.
type Worker struct {
	Since     string               `json:"since"`
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

// WorkerHydration is how far a volume that still has a base or layers below it is.
type WorkerHydration struct {
	Held         int64  `json:"held"` // bytes
	Size         int64  `json:"size"` // bytes
	Copied       int64  `json:"copied"`
	SealedLayers int    `json:"sealedLayers"`
	FailingSince string `json:"failingSince,omitempty"` // of the base
	Tries        int64  `json:"tries,omitempty"`
	Reason       string `json:"reason,omitempty"` // for operators alone
}

// IOInUse is what goes through the volumes that are in use.
type IOInUse struct {
	Data []VolumeIO `json:"data"`
	More bool       `json:"more"` // there are others
}

func getVolumeIO(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	io, err := c.s.o.Engine.IO(c.r.Context(), c.workspace, name)
	if err != nil {
		return err
	}
	return c.json(ioBody(io, c.principal.ControlPlane))
}

func listVolumeIO(c *call) error {
	all, more, err := c.s.o.Engine.IOInUse(c.r.Context(), c.workspace, mostInUse)
	if err != nil {
		return err
	}
	b := IOInUse{Data: make([]VolumeIO, len(all)), More: more}
	for i, io := range all {
		b.Data[i] = ioBody(io, c.principal.ControlPlane)
	}
	return c.json(b)
}

func ioBody(io engine.IO, operator bool) VolumeIO {
	b := VolumeIO{Name: io.Volume.Name, Counters: countersBody(io.Counters)}
	if io.Service != nil {
		b.Worker = workerBody(*io.Service, operator)
	}
	for _, w := range io.Waits {
		b.Waits = append(b.Waits, Wait{Cause: string(w.Cause), Requests: w.Requests, Text: w.Text})
	}
	return b
}

func workerBody(s serve.Service, operator bool) *Worker {
	b := &Worker{
		Since: stamp(s.Since), Kind: string(s.Kind), Clients: s.Clients, Inside: s.Meter.Inside, Failed: s.Failed != "",
		Limits: limitsBody(s.Limits), Requests: map[string]Served{}, Waiting: map[string]WaitingOn{},
	}
	microseconds := func(k *meter.Counted, share float64) float64 {
		return float64(meter.Quantile(&k.Latency, share).Nanoseconds()) / 1000
	}
	for i := range s.Meter.Kinds {
		k := &s.Meter.Kinds[i]
		b.Requests[meter.Kind(i).String()] = Served{
			Requests: k.Requests, Errors: k.Errors, Bytes: k.Bytes, Seconds: k.Time.Seconds(),
			P50: microseconds(k, .5), P99: microseconds(k, .99), P999: microseconds(k, .999),
		}
	}
	for i, w := range s.Meter.Waits {
		b.Waiting[meter.Cause(i).String()] = WaitingOn{Now: w.Now, Seconds: w.Time.Seconds()}
	}
	if l := s.Layers; l != nil {
		b.Hydration = &WorkerHydration{Held: l.Held, Size: l.Size, Copied: l.Copied, SealedLayers: l.Sealed, Tries: l.Tries}
		if !l.FailingSince.IsZero() {
			b.Hydration.FailingSince = stamp(l.FailingSince)
		}
		if operator {
			b.Hydration.Reason = l.Reason
		}
	}
	return b
}

package vmsocket

import (
	"errors"
	"fmt"

	"holdfast/blockdev"
)

// Rates are Firecracker's RateLimiter and Cloud Hypervisor's RateLimiterConfig, which
// are the same: one budget of requests and one of bytes, each for reads and writes
// together.
type Rates struct {
	Bandwidth *Bucket `json:"bandwidth,omitempty"`
	Ops       *Bucket `json:"ops,omitempty"`
}

// Bucket is the documents' TokenBucket.
type Bucket struct {
	Size   int64 `json:"size"`
	Refill int64 `json:"refill_time"` // in milliseconds
}

// second is the time in which a bucket refills, in milliseconds: what a second allows
// can be had at once, and then no more until it comes back.
const second = 1000

// Given is RatesOf as a field that is left out where nothing is bounded.
func Given(l blockdev.Limits, readOnly bool) (*Rates, error) {
	rates, err := RatesOf(l, readOnly)
	if err != nil || rates.None() {
		return nil, err
	}
	return &rates, nil
}

// RatesOf expresses limits by budgets for reads and writes together: of a reader the
// read limits, of a writer the sum of both. errors.ErrUnsupported for a writer that is
// bounded in one direction only, which would bound the other as well.
func RatesOf(l blockdev.Limits, readOnly bool) (Rates, error) {
	ops, err := bucket("readIops", "writeIops", l.ReadIOPS, l.WriteIOPS, readOnly)
	if err != nil {
		return Rates{}, err
	}
	bandwidth, err := bucket("readBytesPerSecond", "writeBytesPerSecond", l.ReadBytes, l.WriteBytes, readOnly)
	return Rates{Bandwidth: bandwidth, Ops: ops}, err
}

func bucket(readName, writeName string, read, write int64, readOnly bool) (*Bucket, error) {
	if readOnly {
		write = 0
	}
	switch {
	case read == 0 && write == 0:
		return nil, nil //nolint:nilnil // no limit
	case !readOnly && (read == 0 || write == 0):
		return nil, fmt.Errorf("%w: this VMM has one budget for reads and writes together: give both %s and %s, or neither", errors.ErrUnsupported, readName, writeName)
	}
	return &Bucket{Size: read + write, Refill: second}, nil
}

// None reports whether nothing is bounded.
func (r Rates) None() bool { return r.Bandwidth == nil && r.Ops == nil }

// Same compares them by what they bound.
func (r Rates) Same(other Rates) bool {
	return r.Bandwidth.rate() == other.Bandwidth.rate() && r.Ops.rate() == other.Ops.rate()
}

// rate is in tokens per second, 0 for no bound.
func (b *Bucket) rate() int64 {
	if b == nil || b.Refill == 0 {
		return 0
	}
	return b.Size * second / b.Refill
}

// ExplainRates tells what RatesOf makes of limits, and what does not hold of them.
func ExplainRates(mechanism string, l blockdev.Limits, readOnly bool) (blockdev.Enforcement, error) {
	if _, err := RatesOf(l, readOnly); err != nil {
		return blockdev.Enforcement{}, err
	}
	e := blockdev.Enforcement{Mechanism: mechanism, Gaps: []string{"what a second allows, at once, after a pause"}}
	if !readOnly {
		e.Gaps = append(e.Gaps, "reads and writes each: they share one budget, the sum of both limits, and either may use all of it")
	}
	return e, nil
}

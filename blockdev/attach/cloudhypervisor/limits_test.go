package cloudhypervisor_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"holdfast/blockdev"
)

// Limits come with the disk, and stay as they are: what the API cannot do is refused.
func TestLimits(t *testing.T) {
	ctx := context.Background()
	b := start(t, "boot")
	if err := b.Limit(ctx, b.r); err != nil {
		t.Errorf("limits of what is not there: %v", err)
	}
	b.r.Limits = blockdev.Limits{WriteBytes: 1 << 20}
	if err := b.Attach(ctx, b.r); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "give both") {
		t.Errorf("one direction: %v", err)
	}
	b.r.Limits = blockdev.Limits{ReadBytes: 1 << 20, WriteBytes: 1 << 20, ReadIOPS: 10, WriteIOPS: 20}
	for range 2 {
		b.attach(t)
		if err := b.Limit(ctx, b.r); err != nil {
			t.Error(err)
		}
	}
	var config struct {
		Rates json.RawMessage `json:"rate_limiter_config"`
	}
	if err := json.Unmarshal(b.vm.Seen().Disks[diskID].Config, &config); err != nil {
		t.Fatal(err)
	}
	if got := string(config.Rates); got != `{"bandwidth":{"refill_time":1000,"size":2097152},"ops":{"refill_time":1000,"size":30}}` {
		t.Errorf("rates %s", got)
	}
	for _, l := range []blockdev.Limits{{}, {ReadIOPS: 10, WriteIOPS: 21}} {
		other := b.r
		other.Limits = l
		if err := b.Limit(ctx, other); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "detach the volume") {
			t.Errorf("%+v: %v", l, err)
		}
	}
	if err := b.MayChange(b.r.Target); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	if n := b.vm.Count("PUT /api/v1/vm.add-disk"); n != 1 {
		t.Errorf("the disk was added %d times", n)
	}
	b.vm.Kill()
	if err := b.Limit(ctx, b.r); !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("after its end: %v", err)
	}
}

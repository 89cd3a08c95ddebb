package firecracker_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach/vmmtest"
)

func (b *bench) rates(t *testing.T) string {
	t.Helper()
	var config struct {
		Rates json.RawMessage `json:"rate_limiter"`
	}
	if err := json.Unmarshal(b.vm.Seen().Disks[driveID].Config, &config); err != nil {
		t.Fatal(err)
	}
	return string(config.Rates)
}

// Limits are there before the microVM boots, and change while it runs.
func TestLimits(t *testing.T) {
	ctx := context.Background()
	for _, booted := range []bool{false, true} {
		b := start(t)
		if err := b.Limit(ctx, b.r); err != nil {
			t.Errorf("limits of what is not there: %v", err)
		}
		b.r.Limits = blockdev.Limits{ReadIOPS: 100, WriteIOPS: 50}
		b.attach(t)
		if booted {
			b.vm.Steer("boot")
		}
		for _, c := range []struct {
			l    blockdev.Limits
			want string
		}{
			{b.r.Limits, `{"ops":{"refill_time":1000,"size":150}}`},
			{blockdev.Limits{ReadBytes: 1 << 20, WriteBytes: 1 << 20}, `{"bandwidth":{"refill_time":1000,"size":2097152}}`},
			{blockdev.Limits{}, ""},
		} {
			b.r.Limits = c.l
			for range 2 {
				if err := b.Limit(ctx, b.r); err != nil {
					t.Fatal(err)
				}
			}
			if got := b.rates(t); got != c.want {
				t.Errorf("booted %t, %+v: %s", booted, c.l, got)
			}
		}
		if n := b.vm.Count("PUT /drives") + b.vm.Count("PATCH /drives"); n != 3 { // what holds already is not sent
			t.Errorf("booted %t: the drive was set %d times", booted, n)
		}
		b.r.Limits = blockdev.Limits{ReadIOPS: 10, WriteIOPS: 10}
		b.attach(t) // another life of the daemon
		if got := b.rates(t); !strings.Contains(got, `"size":20`) {
			t.Errorf("attached again: %s", got)
		}
		b.vm.Fail(vmmtest.Fault{Request: "GET /", How: vmmtest.FaultStatus, Status: 500, Times: 1})
		if err := b.Limit(ctx, b.r); err == nil {
			t.Error("a VMM that does not say how it is was limited")
		}
		b.vm.Kill()
		if err := b.Limit(ctx, b.r); !errors.Is(err, blockdev.ErrGone) {
			t.Errorf("after its end: %v", err)
		}
	}
}

// What one budget for both directions cannot be is refused, or said.
func TestLimitsOfOneBudget(t *testing.T) {
	b := start(t)
	for _, l := range []blockdev.Limits{{ReadIOPS: 100}, {WriteIOPS: 100}, {ReadBytes: 1 << 20, ReadIOPS: 10, WriteIOPS: 10}} {
		if _, err := b.Explain(b.r.Target, false, l); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "give both") {
			t.Errorf("%+v: %v", l, err)
		}
		b.r.Limits = l
		if err := b.Attach(context.Background(), b.r); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%+v: %v", l, err)
		}
	}
	if n := b.vm.Count("PUT /drives"); n != 0 {
		t.Errorf("%d drives were given", n)
	}
	both, err := b.Explain(b.r.Target, false, blockdev.Limits{ReadIOPS: 10, WriteIOPS: 10})
	if err != nil || len(both.Gaps) != 2 || !strings.Contains(both.Gaps[1], "share one budget") {
		t.Errorf("%+v, %v", both, err)
	}
	reader, err := b.Explain(b.r.Target, true, blockdev.Limits{ReadIOPS: 10})
	if err != nil || len(reader.Gaps) != 1 {
		t.Errorf("%+v, %v", reader, err)
	}
}

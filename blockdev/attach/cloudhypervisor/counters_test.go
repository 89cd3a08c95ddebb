package cloudhypervisor_test

import (
	"context"
	"errors"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach/vmmtest"
)

func TestCounters(t *testing.T) {
	ctx := context.Background()
	b := start(t, "boot")
	if _, err := b.Counters(ctx, b.r); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("of what is not there: %v", err)
	}
	b.attach(t)
	if c, err := b.Counters(ctx, b.r); err != nil || c != (blockdev.Counters{Reads: 1, ReadBytes: 4096, Writes: 2, WriteBytes: 8192}) {
		t.Errorf("%+v, %v", c, err)
	}
	for _, how := range []string{vmmtest.FaultGarbage, vmmtest.FaultHalf, vmmtest.FaultStatus} {
		b.vm.Fail(vmmtest.Fault{Request: "GET /api/v1/vm.counters", How: how, Status: 500, Times: 1})
		if c, err := b.Counters(ctx, b.r); err == nil {
			t.Errorf("%s: %+v", how, c)
		}
	}
	b.vm.Kill()
	if _, err := b.Counters(ctx, b.r); !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("after its end: %v", err)
	}
}

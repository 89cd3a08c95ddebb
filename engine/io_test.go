package engine

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/meter"
)

// served is a service whose requests wait for causes.
func served(inside int64, waits map[meter.Cause]int64) serve.Service {
	s := serve.Service{Kind: blockdev.NBD, Clients: 1}
	s.Meter.Inside = inside
	for c, n := range waits {
		s.Meter.Waits[c].Now = n
	}
	return s
}

func TestWaitsOfAWorker(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	failing := served(1, map[meter.Cause]int64{meter.Hydration: 1})
	failing.Layers = &serve.Hydration{FailingSince: since, Tries: 9, Reason: "dial tcp 10.0.0.1: secret"}
	quiet := served(0, nil)
	quiet.Layers = failing.Layers
	limited := served(3, map[meter.Cause]int64{meter.Throttle: 3})
	limited.Limits = blockdev.Limits{ReadIOPS: 100, WriteBytes: 1 << 20}
	broken := served(0, nil)
	broken.Failed = "fdatasync: input/output error"
	for name, c := range map[string]struct {
		of     serve.Service
		causes []WaitCause
		says   string
	}{
		"nothing":            {served(0, nil), nil, ""},
		"device":             {served(2, map[meter.Cause]int64{meter.Device: 2}), []WaitCause{WaitDevice}, "2 requests wait for the pool's disk"},
		"flush before disk":  {served(2, map[meter.Cause]int64{meter.Device: 1, meter.Flushing: 1}), []WaitCause{WaitFlush, WaitDevice}, "1 request wait"},
		"limits are named":   {limited, []WaitCause{WaitThrottle}, "100 reads/s, 1048576 bytes/s written"},
		"base is slow":       {served(4, map[meter.Cause]int64{meter.Hydration: 4}), []WaitCause{WaitHydration}, "4 requests wait for blocks that come from"},
		"base fails":         {failing, []WaitCause{WaitHydration}, "does not answer since 2026-01-02T03:04:05Z (9 tries)"},
		"base fails, unseen": {quiet, []WaitCause{WaitHydration}, "0 requests wait"},
		"a flush has failed": {broken, []WaitCause{WaitFailed}, "no write is acknowledged"},
	} {
		var causes []WaitCause
		text := ""
		for _, w := range servedWaits(c.of) {
			causes, text = append(causes, w.Cause), text+w.Text+"\n"
		}
		if !slices.Equal(causes, c.causes) || !strings.Contains(text, c.says) {
			t.Errorf("%s: %v, %s", name, causes, text)
		}
		if strings.Contains(text, "secret") || strings.Contains(text, "fdatasync") {
			t.Errorf("%s: a tenant is told an operator's matter: %s", name, text)
		}
	}
}

func TestWaitsOfTheHost(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	v := Volume{
		Frozen: &Freeze{Until: now.Add(time.Second), By: "ann"},
		Attachments: []Attachment{
			{ID: "att-1", Holder: "sandbox:a", Phase: Attached},
			{ID: "att-2", Holder: "sandbox:b", Phase: Detaching, Failure: "files are open"},
		},
	}
	waits := waitsOf(v, &hanging{stepDetach, now}, now)
	var causes []WaitCause
	for _, w := range waits {
		causes = append(causes, w.Cause)
	}
	if !slices.Equal(causes, []WaitCause{WaitStep, WaitStep, WaitFreeze}) ||
		!strings.Contains(waits[0].Text, stepDetach) || !strings.Contains(waits[1].Text, "att-2 (sandbox:b) is detaching: files are open") {
		t.Errorf("%+v", waits)
	}
	if waits := waitsOf(v, nil, now.Add(time.Minute)); len(waits) != 1 {
		t.Errorf("after the freeze: %+v", waits)
	}
}

func TestIO(t *testing.T) {
	w := newWorld(t)
	v := w.create("x", 4)
	ctx := t.Context()
	io, err := w.engine.IO(ctx, v.Workspace, "x")
	if err != nil || io.Service != nil || io.Counters != nil || len(io.Waits) != 1 || io.Waits[0].Cause != WaitNothing {
		t.Errorf("detached: %+v, %v", io, err)
	}
	if _, err := w.engine.IO(ctx, v.Workspace, "absent"); !errors.Is(err, ErrNotFound) {
		t.Errorf("absent: %v", err)
	}
	if _, err := w.pool.Open(ctx, v.ID, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}); err != nil {
		t.Fatal(err)
	}
	io, err = w.engine.IO(ctx, v.Workspace, "x")
	if err != nil || io.Service == nil || io.Service.Kind != blockdev.NBD || io.Counters == nil || len(io.Waits) != 1 {
		t.Errorf("served: %+v, %v", io, err)
	}
	if err := w.pool.Die(v.ID); err != nil {
		t.Fatal(err)
	}
	io, err = w.engine.IO(ctx, v.Workspace, "x")
	if err != nil || io.Service != nil {
		t.Errorf("after the worker's death: %+v, %v", io, err)
	}
}

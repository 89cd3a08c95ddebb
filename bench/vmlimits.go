package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"holdfast/api/client"
)

// limits: how far what fio gets in the guest is from the limits of an attachment,
// which QEMU holds.
func (b *VM) limits(ctx context.Context) (err error) {
	rounds := max(1, b.Rounds/10)
	each := 3 * b.Each // a limit is held over a second or so
	b.say("rate limits, %d rounds", rounds)
	if err := b.create(ctx, "limited", vmVolume); err != nil {
		return err
	}
	at, err := b.d.Client.Attach(ctx, "limited", client.Attachment{Holder: "sandbox:bench", Target: client.Target{Type: "qemu", Socket: b.g.Monitor},
		Limits: &client.RateLimits{ReadIOPS: 1e9}})
	if err != nil {
		return err
	}
	defer func() {
		_, detach := b.d.Client.Detach(context.WithoutCancel(ctx), "limited", at.ID)
		err = errors.Join(err, detach)
	}()
	node, err := b.g.Disk(ctx, at.Serial)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		what   string
		limits client.RateLimits
		args   []string
		unit   string
		limit  float64
		of     func(ioRates) float64
	}{
		{"reads of 4 KiB, limit 100/s", client.RateLimits{ReadIOPS: 100}, []string{"--rw=randread", "--bs=4k", "--iodepth=8"}, "/s", 100, func(r ioRates) float64 { return r.reads }},
		{"writes of 4 KiB, limit 100/s", client.RateLimits{WriteIOPS: 100}, []string{"--rw=randwrite", "--bs=4k", "--iodepth=8"}, "/s", 100, func(r ioRates) float64 { return r.writes }},
		{"reads of 256 KiB, limit 10 MB/s", client.RateLimits{ReadBytes: 10e6}, []string{"--rw=read", "--bs=256k", "--iodepth=4"}, "MB/s", 10, func(r ioRates) float64 { return r.readBytes / 1e6 }},
		{"writes of 256 KiB, limit 10 MB/s", client.RateLimits{WriteBytes: 10e6}, []string{"--rw=write", "--bs=256k", "--iodepth=4"}, "MB/s", 10, func(r ioRates) float64 { return r.writeBytes / 1e6 }},
	} {
		if _, err := b.d.Client.SetLimits(ctx, "limited", at.ID, c.limits); err != nil {
			return err
		}
		var got []float64
		for range rounds {
			r, err := b.fioFor(ctx, node, vmVolume, each, c.args)
			if err != nil {
				return err
			}
			got = append(got, c.of(r))
		}
		slices.Sort(got)
		ratio := middle(got) / c.limit
		b.report.Rows = append(b.report.Rows, Row{Measure: "rate limit in QEMU: " + c.what, Unit: c.unit, Samples: len(got), P50: middle(got), Yardstick: "the limit", Beside: c.limit, Ratio: ratio,
			Goal: limitsGoal, Met: math.Abs(ratio-1) <= 0.05, Note: fmt.Sprintf("off by %+.1f %% over %s", 100*(ratio-1), each.Round(100*time.Millisecond))})
	}
	return nil
}

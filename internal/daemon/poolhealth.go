package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/api"
	"holdfast/blockdev"
)

// healthInterval is how often the pools are asked how they are.
const healthInterval = 5 * time.Second

// stateUnavailable stands beside the states of blockdev.Health for a pool that is
// not open, or does not answer.
const stateUnavailable = "unavailable"

var (
	poolState     = desc("pool_state", "1 for the state that the pool is in: healthy, low, full, needs-repair, failed, unavailable.", "pool", "state")
	poolMetaUsed  = desc("pool_metadata_used_bytes", "Of a thin pool's room for its own account, used.", "pool")
	poolMetaTotal = desc("pool_metadata_bytes", "A thin pool's room for its own account: when it is full, so is the pool.", "pool")

	poolHealthDescs = []*prometheus.Desc{poolState, poolMetaUsed, poolMetaTotal}
)

// health asks a pool how it is; one that cannot tell and answers is healthy.
func (p *otherPool) health(ctx context.Context) (state string, h blockdev.Health) {
	if p.backend == nil {
		return stateUnavailable, blockdev.Health{Reason: p.err.Error()}
	}
	reporter, ok := p.backend.(blockdev.HealthReporter)
	if !ok {
		return string(blockdev.PoolHealthy), h
	}
	h, err := reporter.Health(ctx)
	if err != nil {
		return stateUnavailable, blockdev.Health{Reason: err.Error()}
	}
	return string(h.State), h
}

// poolHealth is part of a scrape.
func (c *nodeCollector) poolHealth(ctx context.Context, out emit) error {
	for _, p := range c.n.others {
		state, h := p.health(ctx)
		out(poolState, prometheus.GaugeValue, 1, p.name, state)
		if h.Meta.Total > 0 {
			out(poolMetaUsed, prometheus.GaugeValue, float64(h.Meta.Used), p.name)
			out(poolMetaTotal, prometheus.GaugeValue, float64(h.Meta.Total), p.name)
		}
	}
	return nil
}

// watchHealth looks at a pool until ctx ends.
func (n *node) watchHealth(ctx context.Context, p *otherPool) error {
	tick := time.NewTicker(healthInterval)
	defer tick.Stop()
	last := poolLook{state: string(blockdev.PoolHealthy)}
	for {
		last = n.lookAt(ctx, p, last)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// poolLook is what was seen of a pool.
type poolLook struct {
	state      string
	data, meta int64 // bytes in all
}

// lookAt logs and audits a change of a pool's state, and lets its ledger know what it
// can hold: a thin pool is made larger while it is used.
func (n *node) lookAt(ctx context.Context, p *otherPool, last poolLook) poolLook {
	state, h := p.health(ctx)
	if ctx.Err() != nil {
		return last
	}
	if state != last.state {
		n.poolChanged(ctx, p.name, last.state, state, h.Reason)
	}
	now := poolLook{state, h.Data.Total, h.Meta.Total}
	if now.data != last.data || now.meta != last.meta {
		if c, err := p.backend.Capacity(ctx); err == nil {
			p.ledger.Resize(c.Total, reserve(Config{}, c.Total))
		}
	}
	return now
}

func (n *node) poolChanged(ctx context.Context, pool, from, to, reason string) {
	n.log.Warn("a pool's state has changed", "pool", pool, "from", from, "to", to, "reason", reason)
	e := api.Entry{Time: time.Now(), Principal: "holdfastd", Action: "pool.state", Resource: pool, Remote: "local", Status: 200, Error: fmt.Sprintf("%s: %s", to, reason)}
	if err := n.audit.Record(context.WithoutCancel(ctx), e); err != nil {
		n.log.Error("audit entry not written", "action", e.Action, "cause", err)
	}
}

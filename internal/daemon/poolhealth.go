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

// watchHealth logs and audits what becomes of a pool's state, until ctx ends.
func (n *node) watchHealth(ctx context.Context, p *otherPool) error {
	tick := time.NewTicker(healthInterval)
	defer tick.Stop()
	last := string(blockdev.PoolHealthy)
	for {
		state, h := p.health(ctx)
		if state != last && ctx.Err() == nil {
			n.poolChanged(ctx, p.name, last, state, h.Reason)
			last = state
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (n *node) poolChanged(ctx context.Context, pool, from, to, reason string) {
	n.log.Warn("a pool's state has changed", "pool", pool, "from", from, "to", to, "reason", reason)
	e := api.Entry{Time: time.Now(), Principal: "holdfastd", Action: "pool.state", Resource: pool, Remote: "local", Status: 200, Error: fmt.Sprintf("%s: %s", to, reason)}
	if err := n.audit.Record(context.WithoutCancel(ctx), e); err != nil {
		n.log.Error("audit entry not written", "action", e.Action, "cause", err)
	}
}

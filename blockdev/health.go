package blockdev

import "context"

// PoolState is what a pool can do, from best to worst.
type PoolState string

// The states of a pool.
const (
	// PoolHealthy: everything.
	PoolHealthy PoolState = "healthy"
	// PoolLow: everything, and it is about to run out of room that it does not get by itself.
	PoolLow PoolState = "low"
	// PoolFull: what needs new space waits or fails; nothing acknowledged is lost.
	PoolFull PoolState = "full"
	// PoolNeedsRepair: it may be read, and takes no changes (ErrNeedsRepair).
	PoolNeedsRepair PoolState = "needs-repair"
	// PoolFailed: it cannot even be read (ErrNeedsRepair).
	PoolFailed PoolState = "failed"
)

// Use is how much of something is used, in bytes.
type Use struct{ Used, Total int64 }

// Health is the state of a pool now, asked and never remembered.
type Health struct {
	State  PoolState
	Reason string // what is wrong and what to do, for an operator; "" when healthy
	Data   Use
	// Meta is the room for the pool's own account of who has which block: when it
	// is full, so is the pool, whatever Data says. Zero where there is none.
	Meta Use
}

// HealthReporter is a backend whose pool can be asked for its health.
type HealthReporter interface {
	// Health asks for the pool's state; it costs less than a millisecond. An error
	// means that it could not be asked.
	Health(ctx context.Context) (Health, error)
}

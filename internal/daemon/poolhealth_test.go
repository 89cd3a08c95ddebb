package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/api/audit"
	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/engine"
)

// patient is a pool that is as the test says.
type patient struct {
	*blockdevtest.Memory
	health blockdev.Health
	err    error
	total  int64
}

func (p *patient) Health(context.Context) (blockdev.Health, error) { return p.health, p.err }

func (p *patient) Capacity(context.Context) (blockdev.Capacity, error) {
	return blockdev.Capacity{Total: p.total, Free: p.total}, nil
}

// TestPoolHealth: each change of a pool's state is told once, in the log and in the
// audit log, and a pool that has become larger takes more.
func TestPoolHealth(t *testing.T) {
	var log bytes.Buffer
	n := &node{log: slog.New(slog.NewTextHandler(&log, nil))}
	path := filepath.Join(t.TempDir(), "audit.log")
	var err error
	if n.audit, err = audit.Open(path, audit.Options{}); err != nil {
		t.Fatal(err)
	}
	backend := &patient{health: blockdev.Health{State: blockdev.PoolHealthy, Data: blockdev.Use{Total: 1 << 30}}, total: 1 << 30}
	p := &otherPool{poolSpec: poolSpec{name: "thin"}, backend: backend, ledger: engine.NewLedger(engine.LedgerOptions{Total: 1 << 30})}
	last := n.lookAt(t.Context(), p, poolLook{state: string(blockdev.PoolHealthy)})
	if log.Len() != 0 {
		t.Errorf("a healthy pool is told of: %s", log.String())
	}
	if _, err := p.ledger.Reserve(2<<30, "a large thing"); err == nil {
		t.Error("twice the pool fits into it")
	}
	backend.total, backend.health.Data.Total = 4<<30, 4<<30
	last = n.lookAt(t.Context(), p, last)
	release, err := p.ledger.Reserve(2<<30, "a large thing")
	if err != nil {
		t.Fatalf("a pool that has become larger takes no more: %v", err)
	}
	release()
	backend.health.State, backend.health.Reason, backend.health.Meta = blockdev.PoolFull, "give it space", blockdev.Use{Used: 3, Total: 4}
	last = n.lookAt(t.Context(), p, last)
	last = n.lookAt(t.Context(), p, last)
	backend.err = errors.New("no answer")
	n.lookAt(t.Context(), p, last)
	if err := n.audit.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{log.String(), string(b)} {
		if strings.Count(text, "give it space") != 1 || strings.Count(text, "no answer") != 1 {
			t.Errorf("told as %s", text)
		}
	}
}

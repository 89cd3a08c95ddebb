package engine

import (
	"errors"
	"sync"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// LedgerOptions configure admission for one pool.
type LedgerOptions struct {
	Total   int64        // bytes that the pool can hold
	Ratio   float64      // overprovision; 1.0: every promise can be kept
	Reserve int64        // bytes kept free for deletes and metadata
	Other   func() int64 // bytes held by what is not a volume; cheap, called under the ledger's lock
	Free    func() int64 // bytes free in the pool now; nil: not watched. Cheap as well
}

// Ledger is the admission account of a pool: what has been promised, and
// whether more can be. In memory, recomputed at start. Safe for concurrent use.
//
// Promises / ratio + what is not a volume + reservations + reserve <= total.
type Ledger struct {
	o LedgerOptions

	mu       sync.Mutex
	promises map[blockdev.ID]promise
	shares   *shares
	expected map[blockdev.ID]int64 // bytes for volumes that are being moved here
	promised int64                 // sum of promises and of what is expected, bytes
	reserved int64                 // sum of reservations, bytes
}

// shares are what the workspaces have of all pools of a host. A ledger's lock is
// taken before theirs.
type shares struct {
	mu  sync.Mutex
	all map[string]*usage
}

type promise struct {
	workspace string
	bytes     int64
	snapshot  bool
}

type usage struct{ volumes, snapshots, bytes int64 }

// NewLedger makes an empty account.
func NewLedger(o LedgerOptions) *Ledger {
	if o.Ratio <= 0 {
		o.Ratio = 1
	}
	if o.Other == nil {
		o.Other = func() int64 { return 0 }
	}
	return &Ledger{o: o, promises: map[blockdev.ID]promise{}, expected: map[blockdev.ID]int64{}, shares: &shares{all: map[string]*usage{}}}
}

// shareQuotas lets the quotas of workspaces count what they have in both pools. Before
// either is used.
func (l *Ledger) shareQuotas(with *Ledger) { l.shares = with.shares }

// Resize tells what the pool can hold now, and what of it is kept free. Promises that
// do not fit any more are kept; there are no new ones.
func (l *Ledger) Resize(total, reserve int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.o.Total, l.o.Reserve = total, reserve
}

// Reserve sets bytes aside for something that is not a volume yet (staging, an
// image being built) until release is called; ErrNoSpace when they are not there.
func (l *Ledger) Reserve(bytes int64, what string) (release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if left := l.available(); bytes > left {
		return nil, problem(ErrNoSpace, "", "%s needs %d MiB and the pool has %d MiB left: delete volumes or template versions, or enlarge the pool",
			what, bytes/filesystem.MiB, max(left, 0)/filesystem.MiB)
	}
	l.reserved += bytes
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.reserved -= bytes
	}), nil
}

// promise sets what a volume is promised to bytes, within the quota and the
// pool. What was promised before (growth) is replaced.
func (l *Ledger) promise(workspace string, id blockdev.ID, bytes int64, q Quota) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shares.mu.Lock()
	defer l.shares.mu.Unlock()
	old, known := l.promises[id]
	if err := l.withinQuota(workspace, bytes, old.bytes, known, q); err != nil {
		return err
	}
	if err := l.fits(bytes - old.bytes); err != nil {
		return err
	}
	l.set(id, promise{workspace: workspace, bytes: bytes})
	return nil
}

// promiseSnapshot is promise for a snapshot: what it holds when it is taken is the
// most that it can ever occupy alone, when its volume has been written anew.
func (l *Ledger) promiseSnapshot(workspace string, id blockdev.ID, bytes int64, q Quota) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shares.mu.Lock()
	defer l.shares.mu.Unlock()
	old, known := l.promises[id]
	if err := l.snapshotWithinQuota(workspace, bytes, old.bytes, known, q); err != nil {
		return err
	}
	if err := l.fits(bytes - old.bytes); err != nil {
		var p *Problem
		if errors.As(err, &p) {
			p.Field = ""
		}
		return err
	}
	l.set(id, promise{workspace: workspace, bytes: bytes, snapshot: true})
	return nil
}

func (l *Ledger) snapshotWithinQuota(workspace string, bytes, before int64, known bool, q Quota) error {
	u := l.shares.of(workspace)
	switch {
	case q.Snapshots > 0 && !known && u.snapshots+1 > q.Snapshots:
		return problem(ErrQuota, "", "the workspace has its maximum of %d snapshots", q.Snapshots)
	case q.MiB > 0 && bytes > before && (u.bytes-before+bytes)/filesystem.MiB > q.MiB:
		return problem(ErrQuota, "", "the workspace's volumes and snapshots would have %d MB together, its maximum is %d MB", (u.bytes-before+bytes)/filesystem.MiB, q.MiB)
	}
	return nil
}

// fits tells whether more bytes can be promised.
func (l *Ledger) fits(bytes int64) error {
	more := int64(float64(bytes) / l.o.Ratio)
	if left := l.available(); more > left {
		return problem(ErrNoSpace, "spec.size", "the pool has %d MiB left and this needs %d MiB: delete volumes, enlarge the pool, or let the operator raise overprovision",
			max(left, 0)/filesystem.MiB, more/filesystem.MiB)
	}
	if l.o.Free != nil && l.o.Free() < l.o.Reserve {
		return problem(ErrNoSpace, "spec.size", "the pool is filled up to its reserve of %d MiB: free or add space", l.o.Reserve/filesystem.MiB)
	}
	return nil
}

// expect sets aside what a volume that is moved here will be promised. Of its
// workspace's quota it takes nothing: the volume counts there already.
func (l *Ledger) expect(id blockdev.ID, bytes int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.fits(bytes - l.expected[id]); err != nil {
		return err
	}
	l.setExpected(id, bytes)
	return nil
}

// expectAnyway is expect for what was found to fit in an earlier life.
func (l *Ledger) expectAnyway(id blockdev.ID, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.setExpected(id, bytes)
}

// expectNot ends an expectation; unknown ids are success.
func (l *Ledger) expectNot(id blockdev.ID) { l.expectAnyway(id, 0) }

func (l *Ledger) setExpected(id blockdev.ID, bytes int64) {
	l.promised += bytes - l.expected[id]
	l.expected[id] = bytes
	if bytes == 0 {
		delete(l.expected, id)
	}
}

func (l *Ledger) withinQuota(workspace string, bytes, before int64, known bool, q Quota) error {
	u := l.shares.of(workspace)
	mib := bytes / filesystem.MiB
	switch {
	case q.LargestMiB > 0 && mib > q.LargestMiB && bytes > before:
		return problem(ErrQuota, "spec.size", "volume size %d MB exceeds maximum allowed size %d MB of this workspace", mib, q.LargestMiB)
	case q.Volumes > 0 && !known && u.volumes+1 > q.Volumes:
		return problem(ErrQuota, "", "the workspace has its maximum of %d volumes", q.Volumes)
	case q.MiB > 0 && bytes > before && (u.bytes-before+bytes)/filesystem.MiB > q.MiB:
		return problem(ErrQuota, "spec.size", "the workspace's volumes and snapshots would have %d MB together, its maximum is %d MB", (u.bytes-before+bytes)/filesystem.MiB, q.MiB)
	}
	return nil
}

// record notes a promise made earlier (at start), without asking whether it fits.
func (l *Ledger) record(workspace string, id blockdev.ID, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shares.mu.Lock()
	defer l.shares.mu.Unlock()
	l.set(id, promise{workspace: workspace, bytes: bytes})
}

// recordSnapshot is record for a snapshot.
func (l *Ledger) recordSnapshot(workspace string, id blockdev.ID, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shares.mu.Lock()
	defer l.shares.mu.Unlock()
	l.set(id, promise{workspace: workspace, bytes: bytes, snapshot: true})
}

// forget ends a promise; unknown ids are success.
func (l *Ledger) forget(id blockdev.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.setExpected(id, 0)
	p, known := l.promises[id]
	if !known {
		return
	}
	delete(l.promises, id)
	l.promised -= p.bytes
	l.shares.mu.Lock()
	defer l.shares.mu.Unlock()
	l.shares.of(p.workspace).add(p, -1)
}

func (l *Ledger) set(id blockdev.ID, p promise) {
	old, known := l.promises[id]
	u := l.shares.of(p.workspace)
	if known {
		u.add(old, -1)
	}
	u.add(p, 1)
	l.promised += p.bytes - old.bytes
	l.promises[id] = p
}

// of is what a workspace has. Under mu.
func (s *shares) of(workspace string) *usage {
	u := s.all[workspace]
	if u == nil {
		u = &usage{}
		s.all[workspace] = u
	}
	return u
}

// add counts a promise in (1) or out (-1).
func (u *usage) add(p promise, sign int64) {
	if p.snapshot {
		u.snapshots += sign
	} else {
		u.volumes += sign
	}
	u.bytes += sign * p.bytes
}

// available is what is left for promises, in bytes of the pool. Under mu.
func (l *Ledger) available() int64 {
	return l.o.Total - int64(float64(l.promised)/l.o.Ratio) - l.o.Other() - l.reserved - l.o.Reserve
}

// room is what can still be promised, in bytes.
func (l *Ledger) room() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return max(int64(float64(l.available())*l.o.Ratio), 0)
}

// status fills the ledger's part of a PoolStatus.
func (l *Ledger) status(p *PoolStatus) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.Provisioned = l.promised
	p.Other = l.o.Other() + l.reserved
	p.Reserve = l.o.Reserve
	p.Ratio = l.o.Ratio
	p.Available = max(int64(float64(l.available())*l.o.Ratio), 0)
	for _, one := range l.promises {
		if one.snapshot {
			p.Snapshots++
		} else {
			p.Volumes++
		}
	}
}

package engine

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"time"

	"holdfast/blockdev"
)

// TrimResult is what a trim did, in bytes.
type TrimResult struct {
	Freed     int64 // that the pool got back: the volume's own space before less after; its writers take from it
	Discarded int64 // that the filesystem says it gave up; it may give up the same again
	Complete  bool
	Reason    string // why it is not complete
}

// TrimNote is the last complete trim of a volume, in its record.
type TrimNote struct {
	At    time.Time `json:"at"`
	Epoch uint64    `json:"epoch"` // writers up to this one cannot have freed anything since
}

// A trim works in pieces, so that it can give way: each is as large as takes
// about pieceTime.
const (
	firstPiece = 1 << 30
	leastPiece = 128 << 20
	mostPiece  = 1 << 40
	pieceTime  = 50 * time.Millisecond
)

// TrimVolume gives the space of a volume's free blocks back to the pool, also of
// a detached one, which it mounts where no tenant can reach it. It gives way to
// every other request for the volume and goes on behind it.
func (e *Engine) TrimVolume(ctx context.Context, workspace, name string) (TrimResult, error) {
	return do(ctx, e, func(ctx context.Context) (TrimResult, error) {
		v, err := e.Volume(workspace, name)
		if err != nil {
			return TrimResult{}, err
		}
		return e.trim(ctx, v.ID, v.Name, true)
	})
}

// trimming is one trim under way.
type trimming struct {
	e      *Engine
	id     blockdev.ID
	name   string
	asked  bool // by a request: it becomes an event
	turns  int
	next   int64 // byte
	piece  int64 // bytes
	before int64 // the volume's own space at the beginning
	result TrimResult
}

func (e *Engine) trim(ctx context.Context, id blockdev.ID, name string, asked bool) (TrimResult, error) {
	t := &trimming{e: e, id: id, name: name, asked: asked, piece: firstPiece}
	for {
		done, err := t.turn(ctx)
		if err != nil {
			return t.result, userError(err)
		}
		if done {
			return t.result, nil
		}
	}
}

// turn works under the volume's lock until nothing is left or somebody waits for
// the lock. What happened to the volume between two turns ends the trim.
func (t *trimming) turn(ctx context.Context) (done bool, err error) {
	release, err := t.e.locks.acquire(ctx, t.id)
	if err != nil {
		return false, err
	}
	defer release()
	first := t.turns == 0
	t.turns++
	v, ok := t.e.catalog.get(t.id)
	if !ok {
		err = problem(ErrNotFound, "", "volume %.60q not found", t.name)
	} else if v, err = t.e.current(ctx, v); err == nil {
		err = t.e.mayTrim(v)
	}
	if err != nil && !first && isProblem(err) {
		t.result.Reason = firstProblem(err).Error()
		return true, nil
	}
	if err != nil {
		return false, err
	}
	v = v.clone()
	at, off, err := t.e.mountForTrim(ctx, &v)
	if err != nil {
		return false, err
	}
	done, err = t.work(ctx, at, first)
	if err := errors.Join(err, off()); err != nil {
		return false, err
	}
	if done {
		err = t.finish(ctx, &v)
	}
	return done, err
}

func (e *Engine) mayTrim(v Volume) error {
	if err := e.mayWork(v, "trim"); err != nil {
		return err
	}
	if v.frozenAt(e.o.Now()) {
		return frozenProblem(v)
	}
	for _, a := range v.Attachments {
		if a.ReadOnly {
			return problem(ErrConflict, "", "volume %q is attached read-only to %s: its device takes no discards until it is detached", v.Name, a.Holder)
		}
		if a.Phase != Attached {
			return problem(ErrConflict, "", "volume %q is %s: try again", v.Name, a.Phase)
		}
	}
	return nil
}

// mountForTrim finds the volume's mount, or makes one of its own that off ends.
func (e *Engine) mountForTrim(ctx context.Context, v *Volume) (at mounted, off func() error, err error) {
	off = func() error { return nil }
	if len(v.Attachments) > 0 {
		at, err = e.mountOf(ctx, *v)
		return at, off, err
	}
	if *v, err = e.prepare(ctx, *v, false); err != nil {
		return at, off, hangingProblem(*v, err)
	}
	off = func() error { return e.deactivate(ctx, *v) }
	dir, err := e.activate(ctx, *v, false)
	if err != nil {
		err = errors.Join(err, off())
	}
	return mounted{e: e, v: *v, dir: dir}, off, err
}

// work trims piece after piece.
func (t *trimming) work(ctx context.Context, at mounted, first bool) (done bool, err error) {
	if err := at.sync(ctx); err != nil {
		return false, err
	}
	if first {
		if t.before, err = t.e.exclusive(ctx, t.id); err != nil {
			return false, err
		}
	}
	for {
		start := time.Now()
		r, err := at.trim(ctx, t.next, t.piece)
		if errors.Is(err, errors.ErrUnsupported) && !isProblem(err) {
			return false, &Problem{Kind: ErrUnsupported, Message: fmt.Sprintf("the device of volume %q takes no discards", t.name), Err: err}
		}
		if err != nil {
			return false, err
		}
		t.result.Discarded += r.Discarded
		t.next = r.Next
		t.adapt(time.Since(start))
		switch {
		case r.Done:
			t.result.Complete = true
			return true, nil
		case t.e.Healthy() != nil:
			t.result.Reason = "the server is stopping"
			return true, nil
		case ctx.Err() != nil:
			return false, ctx.Err()
		case t.e.locks.wanted(t.id):
			return false, nil
		}
	}
}

func (t *trimming) adapt(took time.Duration) {
	switch {
	case took > 2*pieceTime:
		t.piece = max(t.piece/2, leastPiece)
	case took < pieceTime/2:
		t.piece = min(t.piece*2, mostPiece)
	}
}

// finish measures and records.
func (t *trimming) finish(ctx context.Context, v *Volume) error {
	after, err := t.e.exclusive(ctx, t.id)
	if err != nil {
		return err
	}
	t.result.Freed = max(t.before-after, 0)
	t.e.noteTrim(t.result)
	if !t.result.Complete {
		return nil
	}
	v.Trim = &TrimNote{At: t.e.now(), Epoch: v.Epoch}
	if len(v.Attachments) > 0 { // its writer goes on
		v.Trim.Epoch--
		t.e.noteWritten(ctx, v.ID)
	}
	if t.asked {
		t.e.happened(v, "trim", "Trimmed: %d bytes freed", t.result.Freed)
	}
	return t.e.commit(ctx, *v)
}

// exclusive is the space that is the volume's alone.
func (e *Engine) exclusive(ctx context.Context, id blockdev.ID) (int64, error) {
	if a, ok := e.o.Pool.(blockdev.Accountant); ok {
		if bytes, err := a.Exclusive(ctx, id); !errors.Is(err, errors.ErrUnsupported) {
			return bytes, err
		}
	}
	info, err := e.o.Pool.Stat(ctx, id)
	return info.Allocated - info.Shared, err
}

// trims is what the schedule and the metrics remember.
type trims struct {
	written map[blockdev.ID]int64     // bytes that a volume's writer had written at its last trim
	passed  map[blockdev.ID]time.Time // when a volume's trim did not come through
	runs    int64
	freed   int64
}

func (e *Engine) noteTrim(r TrimResult) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.trims.runs++
	e.trims.freed += r.Freed
}

func (e *Engine) noteWritten(ctx context.Context, id blockdev.ID) {
	written := e.written(ctx, id)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.trims.written[id] = written
}

// written counts what a volume's writer has written, -1 where nobody counts.
func (e *Engine) written(ctx context.Context, id blockdev.ID) int64 {
	if meter, ok := e.o.Pool.(blockdev.Meter); ok {
		if c, err := meter.Counters(ctx, id); err == nil {
			return c.WriteBytes
		}
	}
	return -1
}

// Trimmed counts trims, and the bytes that they gave back, since the start.
func (e *Engine) Trimmed() (runs, freed int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.trims.runs, e.trims.freed
}

// Trims trims every volume once in an interval until ctx ends: one at a time, each
// at its own moment of the interval, and only those that something was written to.
func (e *Engine) Trims(ctx context.Context, interval time.Duration) error {
	if interval <= 0 {
		return nil
	}
	ticker := time.NewTicker(min(max(interval/100, time.Second), time.Minute))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		e.trimDue(ctx, interval)
	}
}

// trimDue trims what is due now. A volume that cannot be trimmed is left for its
// next moment.
func (e *Engine) trimDue(ctx context.Context, interval time.Duration) {
	for _, v := range e.volumes() {
		if ctx.Err() != nil {
			return
		}
		if !due(v.ID, e.lastTrim(v), e.o.Now(), interval) || !e.worthTrimming(ctx, v) {
			continue
		}
		r, err := do(ctx, e, func(ctx context.Context) (TrimResult, error) { return e.trim(ctx, v.ID, v.Name, false) })
		switch {
		case errors.Is(err, ErrUnavailable):
			return
		case err != nil:
			e.o.Log.Warn("a scheduled trim failed", "volume", v.ID, "workspace", v.Workspace, "err", err)
		default:
			e.o.Log.Debug("trimmed", "volume", v.ID, "workspace", v.Workspace, "freed", r.Freed, "complete", r.Complete)
		}
		e.passTrim(v.ID, err == nil && r.Complete)
	}
}

// passTrim lets a volume whose trim did not come through wait for its next
// moment; in memory only, for a restart may try again.
func (e *Engine) passTrim(id blockdev.ID, complete bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if complete {
		delete(e.trims.passed, id)
		return
	}
	e.trims.passed[id] = e.o.Now()
}

// lastTrim is when the volume's turn was last taken.
func (e *Engine) lastTrim(v Volume) time.Time {
	last := v.CreatedAt
	if v.Trim != nil {
		last = v.Trim.At
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if passed := e.trims.passed[v.ID]; passed.After(last) {
		return passed
	}
	return last
}

// due reports that the volume's moment in the interval, which its id decides, has
// come since the last time. A thousand volumes have a thousand moments.
func due(id blockdev.ID, last, now time.Time, interval time.Duration) bool {
	h := fnv.New64a()
	_, _ = h.Write([]byte(id))
	offset := int64(h.Sum64() % uint64(interval))
	turn := func(t time.Time) int64 { return (t.UnixNano() - offset) / int64(interval) }
	return turn(now) > turn(last)
}

// worthTrimming: it can be trimmed, and something was written since the last time.
func (e *Engine) worthTrimming(ctx context.Context, v Volume) bool {
	if e.mayTrim(v) != nil || v.Epoch == 0 {
		return false
	}
	if len(v.Attachments) == 0 {
		return v.Trim == nil || v.Trim.Epoch < v.Epoch
	}
	e.mu.Lock()
	before, known := e.trims.written[v.ID]
	e.mu.Unlock()
	return !known || before < 0 || e.written(ctx, v.ID) != before
}

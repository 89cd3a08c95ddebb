package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// Report counts what Reconcile found and did.
type Report struct {
	Volumes     int // that there are now
	Adopted     int // images that explained themselves and had no record
	Newer       int // records that followed a newer description
	Finished    int // creates and deletes that a crash had interrupted
	Missing     int // ready volumes without an image: FAILED
	Discarded   int // drafts of creates that nobody remembers
	Quarantined int // images that nothing explains
}

// Reconcile compares the records with the pool and the kernel and repairs what
// differs: interrupted creates and deletes are finished, images that explain
// themselves and have no record are adopted, attachments whose sandbox is gone
// are released. The daemon calls it at start, before it listens. On an empty
// store it restores everything that the pool and the side log know.
func (e *Engine) Reconcile(ctx context.Context) error {
	_, err := e.ReconcileReport(ctx)
	return err
}

// ReconcileReport is Reconcile, and tells what it did.
func (e *Engine) ReconcileReport(ctx context.Context) (Report, error) {
	var r Report
	images, err := e.o.Pool.List(ctx)
	if err != nil {
		return r, fmt.Errorf("reconcile: list the pool: %w", err)
	}
	found, err := e.locate(ctx, images)
	if err != nil {
		return r, fmt.Errorf("reconcile: %w", err)
	}
	if err := e.restoreQuotas(ctx); err != nil {
		return r, fmt.Errorf("reconcile: quotas: %w", err)
	}
	if err := e.follow(ctx, found, &r); err != nil {
		return r, fmt.Errorf("reconcile: %w", err)
	}
	if err := e.reconcileSnapshots(ctx, images, &r); err != nil {
		return r, fmt.Errorf("reconcile: %w", err)
	}
	if err := e.resumeAll(ctx, &r); err != nil {
		return r, err
	}
	for _, v := range e.buried.all() {
		if err := e.remove(ctx, v); err != nil {
			if lostWrite(err) {
				return r, err
			}
			e.o.Log.Warn("a deletion is not finished: it is tried again", "volume", v.ID, "err", err)
			continue
		}
		r.Finished++
	}
	quarantined, err := e.o.Pool.Quarantined(ctx)
	if err != nil {
		return r, err
	}
	r.Quarantined, r.Volumes = len(quarantined), len(e.volumes())
	e.o.Log.Info("reconciled", "volumes", r.Volumes, "adopted", r.Adopted, "newer", r.Newer, "finished", r.Finished,
		"missing", r.Missing, "discarded", r.Discarded, "quarantined", r.Quarantined)
	return r, nil
}

func (e *Engine) volumes() []Volume {
	var all []Volume
	e.catalog.each(func(v Volume) { all = append(all, v) })
	slices.SortFunc(all, func(a, b Volume) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return all
}

// follow lets the records follow the images: adopts those without a record, and
// takes a description that is newer than its record.
func (e *Engine) follow(ctx context.Context, found map[blockdev.ID]blockdev.Info, r *Report) error {
	for id, info := range found {
		if info.Draft {
			if _, known := e.catalog.get(id); !known {
				r.Discarded++
				if err := e.o.Pool.Remove(ctx, id); err != nil {
					return err
				}
			}
			continue
		}
		said, err := parseDescription(info.Description)
		if err != nil || said.ID != id {
			e.o.Log.Error("an image's description is not a volume's: it is left alone", "image", id, "err", err)
			continue
		}
		said.Pool = info.Pool // where it was found counts, whatever the operator calls that now
		if err := e.believe(ctx, said, r); err != nil {
			return err
		}
	}
	return nil
}

// believe takes what an image says of itself into the records, if it is news.
func (e *Engine) believe(ctx context.Context, said Volume, r *Report) error {
	if _, buried := e.buried.get(said.ID); buried {
		return nil
	}
	known, ok := e.catalog.get(said.ID)
	switch {
	case said.Phase == Deleting:
		e.catalog.remove(said.ID)
		e.buried.add(said)
		return nil
	case ok && known.Sequence >= said.Sequence && known.Pool == said.Pool:
		return nil
	case ok && known.Sequence >= said.Sequence:
		known = known.clone()
		known.Pool = said.Pool
		e.eachLedger(func(l *Ledger) { l.forget(said.ID) })
		e.ledger(said.Pool).record(known.Workspace, known.ID, known.bytes())
		return e.commit(ctx, known)
	case ok:
		r.Newer++
		e.eachLedger(func(l *Ledger) { l.forget(said.ID) })
		e.ledger(said.Pool).record(said.Workspace, said.ID, said.bytes())
		return e.commit(ctx, said)
	}
	r.Adopted++
	e.ledger(said.Pool).record(said.Workspace, said.ID, said.bytes())
	if !e.catalog.add(said) {
		// Two images claim one name: a description is never dropped, so the one
		// without a record gets a name that tells.
		said.Name = said.Name[:min(len(said.Name), 40)] + "-" + string(said.ID[len(said.ID)-8:])
		e.o.Log.Warn("an adopted volume's name is taken: it is renamed", "volume", said.ID, "name", said.Name)
		if !e.catalog.add(said) {
			return fmt.Errorf("volume %s: no free name for it", said.ID)
		}
		return e.save(ctx, &said)
	}
	return e.o.Store.Update(ctx, func(tx *metadata.Tx) error {
		return volumesTable.Put(tx, string(said.ID), said)
	})
}

// resumeAll resumes all volumes, several at a time: one that hangs does not hold
// the others up.
func (e *Engine) resumeAll(ctx context.Context, r *Report) error {
	var (
		mu    sync.Mutex // of r and first
		first error
		wg    sync.WaitGroup
		slots = make(chan struct{}, maxStepsAtOnce)
	)
	for _, v := range e.volumes() {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			one, err := e.resume(ctx, v)
			mu.Lock()
			defer mu.Unlock()
			r.Finished += one.Finished
			r.Missing += one.Missing
			if err != nil && first == nil {
				first = fmt.Errorf("reconcile volume %s: %w", v.ID, err)
			}
		})
	}
	wg.Wait()
	return first
}

// resume takes a volume on from where its record says it is.
func (e *Engine) resume(ctx context.Context, v Volume) (r Report, err error) {
	release, err := e.locks.acquire(ctx, v.ID)
	if err != nil {
		return r, err
	}
	defer release()
	v = v.clone()
	interrupted := v.Phase != Ready
	e.countIO(ctx, v.ID, true)
	err = e.thawFound(ctx, &v)
	if err == nil {
		err = e.tendAttachments(ctx, &v, true)
	}
	if err == nil {
		err = e.limitAgain(ctx, v)
	}
	if err == nil && len(v.Attachments) == 0 {
		err = e.closeDevice(ctx, v)
	}
	if err == nil && v.orphaned() { // a crash came between its making and its attachment
		return r, e.end(ctx, &v)
	}
	if err == nil {
		err = e.settle(ctx, &v)
	}
	switch {
	case lostWrite(err):
		return r, err
	case hangs(err) != nil:
		e.o.Log.Warn("a volume waits for a step that hangs", "volume", v.ID, "name", v.Name, "err", err)
	case err != nil && interrupted:
		r.Finished++
		e.o.Log.Warn("an interrupted create cannot be finished: it is taken back", "volume", v.ID, "err", err)
		return r, e.abandon(ctx, v, "", nil)
	case errors.Is(err, blockdev.ErrLayered):
		e.setPending(v.ID, pendingFlat)
		e.watch(v.ID)
	case err != nil:
		e.o.Log.Warn("a volume needs another try", "volume", v.ID, "name", v.Name, "err", err)
		e.setPending(v.ID, pendingFailed)
		e.watch(v.ID)
	case interrupted:
		r.Finished++
	}
	if v.Failure != "" {
		r.Missing++
	}
	if len(v.Attachments) > 0 {
		e.guard(v)
	}
	if len(v.Attachments) > 0 || v.Move != nil || v.Remote {
		e.watch(v.ID)
	}
	return r, nil
}

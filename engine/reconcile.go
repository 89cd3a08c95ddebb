package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
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
	found := make(map[blockdev.ID]blockdev.Info, len(images))
	for _, info := range images {
		if strings.HasPrefix(string(info.ID), blockdev.PrefixVolume+"-") {
			found[info.ID] = info
		}
	}
	if err := e.restoreQuotas(ctx); err != nil {
		return r, fmt.Errorf("reconcile: quotas: %w", err)
	}
	if err := e.follow(ctx, found, &r); err != nil {
		return r, fmt.Errorf("reconcile: %w", err)
	}
	for _, v := range e.volumes() {
		if err := e.resume(ctx, v, &r); err != nil {
			return r, fmt.Errorf("reconcile volume %s: %w", v.ID, err)
		}
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
	case ok && known.Sequence >= said.Sequence:
		return nil
	case ok:
		r.Newer++
		e.o.Ledger.record(said.Workspace, said.ID, said.bytes())
		return e.commit(ctx, said)
	}
	r.Adopted++
	e.o.Ledger.record(said.Workspace, said.ID, said.bytes())
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

// resume takes a volume on from where its record says it is.
func (e *Engine) resume(ctx context.Context, v Volume, r *Report) error {
	release, err := e.locks.acquire(ctx, v.ID)
	if err != nil {
		return err
	}
	defer release()
	v = v.clone()
	interrupted := v.Phase != Ready
	e.countIO(ctx, v.ID, true)
	err = e.thawFound(ctx, &v)
	if err == nil {
		err = e.tendAttachments(ctx, &v)
	}
	if err == nil && len(v.Attachments) == 0 {
		err = e.deactivate(ctx, v)
	}
	if err == nil {
		err = e.settle(ctx, &v)
	}
	switch {
	case lostWrite(err):
		return err
	case err != nil && interrupted:
		r.Finished++
		e.o.Log.Warn("an interrupted create cannot be finished: it is taken back", "volume", v.ID, "err", err)
		return e.abandon(ctx, v, "", nil)
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
		e.watch(v.ID)
	}
	return nil
}

// Run repeats in the background what is to be retried (pending growth,
// detaching, probes of sandboxes) until ctx ends.
func (e *Engine) Run(ctx context.Context) error {
	ticker := time.NewTicker(e.o.ProbeInterval)
	defer ticker.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-e.kick:
		}
		if err := e.tend(ctx); err != nil {
			if err = e.inspect(err); errors.Is(err, ErrUnavailable) {
				return err
			}
			if text := err.Error(); text != said { // not every two seconds
				e.o.Log.Warn("background work failed: it is tried again", "err", err)
				said = text
			}
		}
	}
}

// A volume that does not settle (a damaged filesystem, say) is tried again after
// a time that doubles: a checker that fails every two seconds helps nobody.
const (
	firstRetry = 5 * time.Second
	lastRetry  = 10 * time.Minute
)

type retry struct {
	at   time.Time
	wait time.Duration
}

func (e *Engine) due(id blockdev.ID) bool {
	now := e.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	return !now.Before(e.retries[id].at)
}

func (e *Engine) forgetRetry(id blockdev.ID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.retries, id)
}

func (e *Engine) postpone(id blockdev.ID) {
	now := e.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	wait := min(max(2*e.retries[id].wait, firstRetry), lastRetry)
	e.retries[id] = retry{now.Add(wait), wait}
}

// tend looks once at every volume that needs attention.
func (e *Engine) tend(ctx context.Context) error {
	var failures error
	for _, v := range e.buried.all() {
		if release, free := e.locks.try(v.ID); free {
			failures = errors.Join(failures, e.remove(ctx, v))
			release()
		}
	}
	for _, id := range e.attentive() {
		if release, free := e.locks.try(id); free {
			failures = errors.Join(failures, e.tendVolume(ctx, id))
			release()
		}
	}
	return errors.Join(failures, e.forgetKeys(ctx))
}

func (e *Engine) attentive() []blockdev.ID {
	e.mu.Lock()
	defer e.mu.Unlock()
	ids := make([]blockdev.ID, 0, len(e.attention))
	for id := range e.attention {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (e *Engine) tendVolume(ctx context.Context, id blockdev.ID) error {
	v, ok := e.catalog.get(id)
	if !ok {
		e.unwatch(id)
		return nil
	}
	v = v.clone()
	if err := e.tendAttachments(ctx, &v); err != nil {
		return fmt.Errorf("volume %s: %w", id, err)
	}
	if len(v.Attachments) > 0 && e.pendingReason(id) == "" || !e.due(id) {
		return nil
	}
	if err := e.settle(ctx, &v); err != nil {
		e.postpone(id)
		return fmt.Errorf("volume %s: %w", id, err)
	}
	if len(v.Attachments) == 0 {
		e.unwatch(id)
	}
	return nil
}

// tendAttachments takes each attachment on by one step.
func (e *Engine) tendAttachments(ctx context.Context, v *Volume) error {
	var failures error
	for _, a := range slices.Clone(v.Attachments) {
		if err := e.tendAttachment(ctx, v, a); err != nil {
			failures = errors.Join(failures, fmt.Errorf("attachment %s: %w", a.ID, err))
		}
	}
	return failures
}

func (e *Engine) tendAttachment(ctx context.Context, v *Volume, a Attachment) error {
	attacher := e.o.Attachers[a.Target.Type]
	if attacher == nil {
		return fmt.Errorf("attachments of type %q are not configured", a.Target.Type)
	}
	if a.Phase == Detaching {
		return e.release(ctx, v, a.ID)
	}
	request, err := e.request(ctx, *v, a)
	if err != nil {
		return err
	}
	state, err := attacher.Probe(ctx, request)
	switch {
	case err != nil:
		return err // unknown: still attached
	case state == attach.StateGone:
		e.happened(v, "detach", "%s is gone", a.Holder)
		return e.release(ctx, v, a.ID)
	case state == attach.StateMissing || a.Phase == Attaching:
		err := e.bring(ctx, v, a.ID)
		if errors.Is(err, blockdev.ErrGone) {
			return e.release(ctx, v, a.ID)
		}
		return err
	}
	return nil
}

package engine

import (
	"context"
	"encoding/json"

	"holdfast/metadata"
)

// sideLogQuota is the kind of a quota in the side log.
const sideLogQuota = "quota"

// SetQuota bounds a workspace, durably. What is there already stays, also when
// it is beyond the new bounds.
func (e *Engine) SetQuota(ctx context.Context, workspace string, q Quota) error {
	if q.Volumes < 0 || q.MiB < 0 || q.LargestMiB < 0 || q.Snapshots < 0 {
		return problem(ErrInvalid, "quota", "bounds must not be negative (0 is no bound)")
	}
	_, err := do(ctx, e, func(ctx context.Context) (struct{}, error) {
		if err := e.o.SideLog.Append(sideLogQuota, workspace, q); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, e.putQuota(ctx, workspace, q)
	})
	return err
}

func (e *Engine) putQuota(ctx context.Context, workspace string, q Quota) error {
	err := e.o.Store.Update(ctx, func(tx *metadata.Tx) error {
		return quotasTable.Put(tx, workspace, q)
	})
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.quotas[workspace] = q
	return nil
}

// Quota tells the bounds of a workspace; the zero Quota is none.
func (e *Engine) Quota(workspace string) Quota {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.quotas[workspace]
}

// restoreQuotas replays the side log, the authority for quotas.
func (e *Engine) restoreQuotas(ctx context.Context) error {
	return e.o.SideLog.Each(sideLogQuota, func(workspace string, value []byte) error {
		var q Quota
		if err := json.Unmarshal(value, &q); err != nil {
			return err
		}
		if q == e.Quota(workspace) {
			return nil
		}
		return e.putQuota(ctx, workspace, q)
	})
}

package auth

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"

	"holdfast/api"
	"holdfast/metadata"
)

const (
	maxNameBytes = 256
	// keepOver is how long revoked and expired keys are still listed.
	keepOver = 90 * 24 * time.Hour
)

// CreateKey makes a key and gives its text, which is not kept. The key is
// durable, and good, on return. api.ErrMissing when its workspace does not
// exist, api.ErrBadRequest when a field breaks a rule.
func (a *Auth) CreateKey(ctx context.Context, n api.NewKey) (api.Key, string, error) {
	if err := a.checkNewKey(n); err != nil {
		return api.Key{}, "", err
	}
	id, text := newText()
	h := hashText(text)
	k := keyRecord{
		Sequence: 1, ID: id, Name: n.Name, Hash: hex.EncodeToString(h[:]), Workspace: n.Workspace, Role: n.Role, ControlPlane: n.ControlPlane,
		CreatedAt: a.stamp(), CreatedBy: n.Actor,
	}
	if !n.ExpiresAt.IsZero() {
		k.ExpiresAt = n.ExpiresAt.UTC().Round(0)
	}
	a.change.Lock()
	defer a.change.Unlock()
	if n.Workspace != "" {
		if _, err := a.Workspace(n.Workspace); err != nil {
			return api.Key{}, "", err
		}
	}
	if err := a.forgetOld(ctx); err != nil {
		return api.Key{}, "", err
	}
	if err := a.o.SideLog.Append(keyShelf.kind, id, k); err != nil {
		return api.Key{}, "", err
	}
	err := a.o.Store.Update(ctx, func(tx *metadata.Tx) error { return keyShelf.table.Put(tx, id, k) })
	if err != nil {
		// Nobody has the text: the key would do no harm, but it would be listed.
		return api.Key{}, "", errors.Join(err, a.o.SideLog.Append(keyShelf.kind, id, nil))
	}
	a.mu.Lock()
	a.keys[id] = &heldKey{keyRecord: k, hash: h}
	a.mu.Unlock()
	a.log.Info("API key created", "key", k, "by", n.Actor)
	return k.key(), text, nil
}

func (a *Auth) checkNewKey(n api.NewKey) error {
	switch {
	case n.Role != api.Reader && n.Role != api.Writer && n.Role != api.Admin:
		return badRequest("role", "must be reader, writer or admin")
	case n.Workspace == "" && !n.ControlPlane:
		return badRequest("workspace", "a key without a workspace must be a control-plane key")
	case len(n.Name) > maxNameBytes || !utf8.ValidString(n.Name):
		return badRequest("name", "must be at most %d bytes of UTF-8", maxNameBytes)
	case !n.ExpiresAt.IsZero() && !n.ExpiresAt.After(a.now()):
		return badRequest("expiresAt", "must be in the future")
	}
	return nil
}

func badRequest(field, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", api.ErrBadRequest, field, fmt.Sprintf(format, args...))
}

// Keys lists the keys of a workspace, oldest first, revoked and expired ones
// for keepOver; an empty workspace: all keys, control-plane ones too.
func (a *Auth) Keys(workspace string) ([]api.Key, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	list := []api.Key{}
	for _, k := range a.keys {
		if k.seenFrom(workspace) {
			list = append(list, k.key())
		}
	}
	slices.SortFunc(list, func(x, y api.Key) int {
		return cmp.Or(x.CreatedAt.Compare(y.CreatedAt), cmp.Compare(x.ID, y.ID))
	})
	return list, nil
}

// seenFrom: a control-plane key belongs to nobody's workspace, also when it has one.
func (k keyRecord) seenFrom(workspace string) bool {
	return workspace == "" || k.Workspace == workspace && !k.ControlPlane
}

// LastUsed tells, to the second, when a key was last used since the start; zero: not.
func (a *Auth) LastUsed(id string) time.Time {
	k := a.held(id)
	if k == nil || k.used.Load() == 0 {
		return time.Time{}
	}
	return time.Unix(k.used.Load(), 0).UTC()
}

// RevokeKey ends a key and its tokens: for the next request at once, and
// durably on return; revoked already is success. A key of another workspace is
// api.ErrMissing, like one that does not exist; an empty workspace finds all.
func (a *Auth) RevokeKey(ctx context.Context, workspace, id, actor string) (api.Key, error) {
	a.change.Lock()
	defer a.change.Unlock()
	k := a.held(id)
	if k == nil || !k.seenFrom(workspace) {
		return api.Key{}, fmt.Errorf("%w: no API key %.64q", api.ErrMissing, id)
	}
	if !k.RevokedAt.IsZero() {
		return k.key(), nil
	}
	if err := a.revoke(ctx, k, actor); err != nil {
		return api.Key{}, err
	}
	return a.held(id).key(), nil
}

// revoke takes effect in memory before it is durable: when the writing fails
// the caller gets an error, but the key stays out until a restart at least.
func (a *Auth) revoke(ctx context.Context, k *heldKey, actor string) error {
	revoked := &heldKey{keyRecord: k.keyRecord, hash: k.hash}
	revoked.Sequence++
	revoked.RevokedAt, revoked.RevokedBy = a.stamp(), actor
	revoked.used.Store(k.used.Load())
	a.mu.Lock()
	a.keys[k.ID] = revoked
	a.mu.Unlock()
	a.log.Info("API key revoked", "key", revoked.keyRecord, "by", actor)
	record := revoked.keyRecord
	if err := a.o.SideLog.Append(keyShelf.kind, k.ID, record); err != nil {
		return err
	}
	return a.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error { return keyShelf.table.Put(tx, k.ID, record) })
}

// forgetOld removes keys that have been over for long. Removing one cannot
// revive it: a key that is nowhere is not valid.
func (a *Auth) forgetOld(ctx context.Context) error {
	before := a.now().Add(-keepOver)
	var old []string
	a.mu.RLock()
	for id, k := range a.keys {
		if k.over(before) != "" && (k.RevokedAt.IsZero() || k.RevokedAt.Before(before)) {
			old = append(old, id)
		}
	}
	a.mu.RUnlock()
	for _, id := range old {
		err := a.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error { return keyShelf.table.Delete(tx, id) })
		if err != nil {
			return err
		}
		if err := a.o.SideLog.Append(keyShelf.kind, id, nil); err != nil {
			return err
		}
		a.mu.Lock()
		delete(a.keys, id)
		a.mu.Unlock()
	}
	return nil
}

package auth

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"holdfast/api"
	"holdfast/metadata"
)

// nameForm is the rule for all names of the API.
var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,47}[a-z0-9])?$`)

const maxDisplayName = 63 // characters

// PutWorkspace makes a workspace, or changes the display name of the one that
// is there (nil: keeps it). Durable on return.
func (a *Auth) PutWorkspace(ctx context.Context, name string, displayName *string, actor string) (api.Workspace, error) {
	if !nameForm.MatchString(name) {
		return api.Workspace{}, badRequest("name", "must be 1 to 49 characters a-z, 0-9 and -, beginning and ending with a letter or digit")
	}
	if displayName != nil && (!utf8.ValidString(*displayName) || utf8.RuneCountInString(*displayName) > maxDisplayName) {
		return api.Workspace{}, badRequest("displayName", "must be at most %d characters of UTF-8", maxDisplayName)
	}
	a.change.Lock()
	defer a.change.Unlock()
	w, exists := a.record(name)
	next, now := w, a.stamp()
	if !exists {
		id, _ := newText()
		next = workspaceRecord{ID: "ws-" + id, Name: name, Sequence: w.Sequence, CreatedAt: now, CreatedBy: actor}
	}
	if displayName != nil {
		next.DisplayName = *displayName
	}
	if exists && next == w {
		return w.workspace(), nil
	}
	next.Sequence++
	next.UpdatedAt, next.UpdatedBy = now, actor
	if err := a.putWorkspace(ctx, next, a.o.Store.Update); err != nil {
		return api.Workspace{}, err
	}
	return next.workspace(), nil
}

// putWorkspace makes a record durable, then visible.
func (a *Auth) putWorkspace(ctx context.Context, w workspaceRecord, update func(context.Context, func(*metadata.Tx) error) error) error {
	if err := a.o.SideLog.Append(workspaceShelf.kind, w.Name, w); err != nil {
		return err
	}
	err := update(ctx, func(tx *metadata.Tx) error { return workspaceShelf.table.Put(tx, w.Name, w) })
	if err != nil {
		return errors.Join(err, a.undoWorkspace(w.Name))
	}
	a.mu.Lock()
	a.workspaces[w.Name] = w
	a.mu.Unlock()
	return nil
}

// undoWorkspace puts what was there before back into the side log.
func (a *Auth) undoWorkspace(name string) error {
	a.mu.RLock()
	old, ok := a.workspaces[name]
	a.mu.RUnlock()
	if !ok {
		return a.o.SideLog.Append(workspaceShelf.kind, name, nil)
	}
	return a.o.SideLog.Append(workspaceShelf.kind, name, old)
}

// record finds a workspace; not ok: there is none, but its mark may be there.
func (a *Auth) record(name string) (w workspaceRecord, ok bool) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	w, ok = a.workspaces[name]
	return w, ok && w.DeletedAt.IsZero()
}

// DeleteWorkspace removes a workspace and revokes its keys. That nothing else
// is in it is for the caller to see. Absent is api.ErrMissing.
func (a *Auth) DeleteWorkspace(ctx context.Context, name, actor string) error {
	a.change.Lock()
	defer a.change.Unlock()
	w, ok := a.record(name)
	if !ok {
		return missingWorkspace(name)
	}
	for _, k := range a.keysOf(name) {
		if err := a.revoke(ctx, k, actor); err != nil {
			return err
		}
	}
	w.Sequence++
	w.DeletedAt, w.UpdatedAt, w.UpdatedBy = a.stamp(), a.stamp(), actor
	return a.putWorkspace(ctx, w, a.o.Store.UpdateFreeing)
}

// keysOf gives the keys of a workspace that are not revoked.
func (a *Auth) keysOf(workspace string) (list []*heldKey) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, k := range a.keys {
		if k.Workspace == workspace && k.RevokedAt.IsZero() {
			list = append(list, k)
		}
	}
	return list
}

// Workspace finds one; api.ErrMissing when there is none.
func (a *Auth) Workspace(name string) (api.Workspace, error) {
	w, ok := a.record(name)
	if !ok {
		return api.Workspace{}, missingWorkspace(name)
	}
	return w.workspace(), nil
}

func missingWorkspace(name string) error {
	return fmt.Errorf("%w: no workspace %.64q", api.ErrMissing, name)
}

// Workspaces lists all, by name.
func (a *Auth) Workspaces() ([]api.Workspace, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	list := []api.Workspace{}
	for _, w := range a.workspaces {
		if w.DeletedAt.IsZero() {
			list = append(list, w.workspace())
		}
	}
	slices.SortFunc(list, func(x, y api.Workspace) int { return strings.Compare(x.Name, y.Name) })
	return list, nil
}

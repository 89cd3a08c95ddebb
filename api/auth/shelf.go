package auth

import (
	"context"
	"encoding/json"
	"fmt"

	"holdfast/metadata"
)

// shelf keeps one kind of record in the side log and in the database.
type shelf[T any] struct {
	kind     string // in the side log
	table    metadata.Table[T]
	sequence func(T) uint64
	over     func(T) bool // revoked or deleted: counts whichever says so
}

var (
	keyShelf = shelf[keyRecord]{
		kind: "key", table: metadata.Table[keyRecord]{Name: "keys"},
		sequence: func(k keyRecord) uint64 { return k.Sequence },
		over:     func(k keyRecord) bool { return !k.RevokedAt.IsZero() },
	}
	workspaceShelf = shelf[workspaceRecord]{
		kind: "workspace", table: metadata.Table[workspaceRecord]{Name: "workspaces"},
		sequence: func(w workspaceRecord) uint64 { return w.Sequence },
		over:     func(w workspaceRecord) bool { return !w.DeletedAt.IsZero() },
	}
)

// load reads both places, settles where they differ, and makes both durably
// agree. It tells how many records only one of them had in this form.
func (s shelf[T]) load(ctx context.Context, store *metadata.Store, log *metadata.SideLog) (all map[string]T, mended int, err error) {
	logged, err := s.logged(log)
	if err != nil {
		return nil, 0, err
	}
	stored := map[string]T{}
	err = store.View(func(tx *metadata.Tx) error {
		return s.table.Scan(tx, "", func(key string, v T) error { stored[key] = v; return nil })
	})
	if err != nil {
		return nil, 0, err
	}
	all = map[string]T{}
	for key, v := range stored {
		if l, ok := logged[key]; !ok || s.newer(v, l) {
			if err := log.Append(s.kind, key, v); err != nil {
				return nil, 0, err
			}
			mended++
		}
		all[key] = v
	}
	lagging := map[string]T{}
	for key, v := range logged {
		if st, ok := stored[key]; !ok || s.newer(v, st) {
			lagging[key], all[key] = v, v
			mended++
		}
	}
	return all, mended, s.store(ctx, store, lagging)
}

// newer: a record that says "over" beats one that does not, else the sequence decides.
func (s shelf[T]) newer(a, b T) bool {
	if s.over(a) != s.over(b) && s.sequence(a) == s.sequence(b) {
		return s.over(a)
	}
	return s.sequence(a) > s.sequence(b)
}

func (s shelf[T]) logged(log *metadata.SideLog) (map[string]T, error) {
	all := map[string]T{}
	err := log.Each(s.kind, func(key string, value []byte) error {
		var v T
		if err := json.Unmarshal(value, &v); err != nil {
			return fmt.Errorf("%s %q in the side log: %w", s.kind, key, err)
		}
		all[key] = v
		return nil
	})
	return all, err
}

// storeAtOnce is how many records one transaction takes.
const storeAtOnce = 500

func (s shelf[T]) store(ctx context.Context, store *metadata.Store, records map[string]T) error {
	keys := make([]string, 0, len(records))
	for key := range records {
		keys = append(keys, key)
	}
	for len(keys) > 0 {
		n := min(len(keys), storeAtOnce)
		err := store.UpdateFreeing(ctx, func(tx *metadata.Tx) error {
			for _, key := range keys[:n] {
				if err := s.table.Put(tx, key, records[key]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		keys = keys[n:]
	}
	return nil
}

package auth

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/api"
	"holdfast/metadata"
)

// Options are what an Auth is made of.
type Options struct {
	Store   *metadata.Store
	SideLog *metadata.SideLog
	Secret  []byte        // of which the key that signs access tokens is derived; at least 32 bytes
	Life    time.Duration // of an access token; 0: an hour
	Log     *slog.Logger  // nil: slog.Default
	Now     func() time.Time
}

// Auth keeps workspaces and API keys. It is safe for concurrent use.
type Auth struct {
	o      Options
	log    *slog.Logger
	now    func() time.Time
	signer signer

	change sync.Mutex // one change at a time; held over the writing

	mu         sync.RWMutex // of the maps; never held over a write
	keys       map[string]*heldKey
	workspaces map[string]workspaceRecord // deleted ones too
}

// heldKey is a key in memory.
type heldKey struct {
	keyRecord
	hash [32]byte
	used atomic.Int64 // when last, Unix seconds; not kept over a restart
}

var _ api.Access = (*Auth)(nil)

// Open reads all keys and workspaces. A side log or a database that has lost
// its records gets them from the other; when both are empty nobody but the
// local socket has access.
func Open(ctx context.Context, o Options) (*Auth, error) {
	if o.Store == nil || o.SideLog == nil {
		return nil, errors.New("auth: Store and SideLog are required")
	}
	sign, err := newSigner(o.Secret)
	if err != nil {
		return nil, fmt.Errorf("auth: %w", err)
	}
	if o.Life == 0 {
		o.Life = time.Hour
	}
	a := &Auth{o: o, log: o.Log, now: o.Now, signer: sign, keys: map[string]*heldKey{}}
	if a.log == nil {
		a.log = slog.Default()
	}
	if a.now == nil {
		a.now = time.Now
	}
	if err := a.load(ctx); err != nil {
		return nil, fmt.Errorf("auth: %w", err)
	}
	return a, nil
}

func (a *Auth) load(ctx context.Context) error {
	keys, mendedKeys, err := keyShelf.load(ctx, a.o.Store, a.o.SideLog)
	if err != nil {
		return err
	}
	workspaces, mendedWorkspaces, err := workspaceShelf.load(ctx, a.o.Store, a.o.SideLog)
	if err != nil {
		return err
	}
	if n := mendedKeys + mendedWorkspaces; n > 0 {
		a.log.Warn("keys and workspaces differed between the side log and the database; the newer ones are in both now", "records", n)
	}
	a.workspaces = workspaces
	for id, k := range keys {
		h, err := k.decodeHash()
		if err != nil || id != k.ID {
			return fmt.Errorf("key %q: record is not valid: %w", id, err)
		}
		a.keys[id] = &heldKey{keyRecord: k, hash: h}
	}
	if len(a.keys) == 0 {
		a.log.Warn("there are no API keys: only the local socket has access")
	}
	return nil
}

// stamp is a time as records keep it.
func (a *Auth) stamp() time.Time { return a.now().UTC().Round(0) }

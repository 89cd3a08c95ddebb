package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// keyLifetime is how long an Idempotency-Key is remembered.
const keyLifetime = 24 * time.Hour

// maxKeyLength bounds an Idempotency-Key, in bytes.
const maxKeyLength = 255

// remembered is what an Idempotency-Key stands for.
type remembered struct {
	Request string      `json:"request"` // digest of what was asked
	Volume  blockdev.ID `json:"volume"`  // or snapshot
	Name    string      `json:"name"`
	Expires time.Time   `json:"expires"`
}

// idempotency is the memory of keys, durable in the store; keys under way are
// only here. The key is workspace "/" digest.
type idempotency struct {
	mu       sync.Mutex
	known    map[string]remembered
	underWay map[string]chan struct{}
}

func newIdempotency() *idempotency {
	return &idempotency{known: map[string]remembered{}, underWay: map[string]chan struct{}{}}
}

func (k *idempotency) load(key string, r remembered) { k.known[key] = r }

// enter waits while the same key is under way, then tells what is known of it;
// the caller has it alone until it calls leave.
func (k *idempotency) enter(ctx context.Context, key string, now time.Time) (r remembered, known bool, leave func(*remembered), err error) {
	for {
		k.mu.Lock()
		busy := k.underWay[key]
		if busy == nil {
			done := make(chan struct{})
			k.underWay[key] = done
			r, known = k.known[key]
			k.mu.Unlock()
			if known && now.After(r.Expires) {
				known = false
			}
			return r, known, func(learned *remembered) { k.leave(key, done, learned) }, nil
		}
		k.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return r, false, nil, ctx.Err()
		}
	}
}

func (k *idempotency) leave(key string, done chan struct{}, learned *remembered) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if learned != nil {
		k.known[key] = *learned
	}
	delete(k.underWay, key)
	close(done)
}

// expired lists keys that may be forgotten.
func (k *idempotency) expired(now time.Time) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var old []string
	for key, r := range k.known {
		if now.After(r.Expires) {
			old = append(old, key)
		}
	}
	return old
}

// of lists the keys that stand for something.
func (k *idempotency) of(id blockdev.ID) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var keys []string
	for key, r := range k.known {
		if r.Volume == id {
			keys = append(keys, key)
		}
	}
	return keys
}

func (k *idempotency) forget(keys []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range keys {
		delete(k.known, key)
	}
}

// keyed is a request that may have an Idempotency-Key.
type keyed[T any] struct {
	workspace, key string
	request        string // digest of what is asked
	// make does it, and writes the key's digest with the intent, unless that is empty.
	make   func(ctx context.Context, key string) (made T, id blockdev.ID, name string, err error)
	replay func(id blockdev.ID) (T, bool)
}

// once gives the same answer to the same request under the same key.
func once[T any](ctx context.Context, e *Engine, k keyed[T]) (made T, err error) {
	if k.key == "" {
		made, _, _, err = k.make(ctx, "")
		return made, err
	}
	if len(k.key) > maxKeyLength {
		return made, problem(ErrInvalid, "Idempotency-Key", "must be at most %d bytes", maxKeyLength)
	}
	sum := sha256.Sum256([]byte(k.key))
	key := k.workspace + "/" + hex.EncodeToString(sum[:])
	old, known, leave, err := e.keys.enter(ctx, key, e.now())
	if err != nil {
		return made, err
	}
	if known {
		defer leave(nil)
		return k.again(old)
	}
	made, id, name, err := k.make(ctx, key)
	if err != nil {
		// A caller that left early does not know the outcome: the intent, if it
		// became durable, is read back.
		leave(e.recall(key))
		return made, err
	}
	learned := e.remember(id, name, k.request)
	leave(&learned)
	return made, nil
}

func (k keyed[T]) again(old remembered) (made T, err error) {
	if old.Request != k.request {
		return made, problem(ErrConflict, "Idempotency-Key", "was used for another request")
	}
	if made, ok := k.replay(old.Volume); ok {
		return made, nil
	}
	return made, problem(ErrConflict, "Idempotency-Key", "what it made, %q, has been deleted since", old.Name)
}

func (e *Engine) remember(id blockdev.ID, name, request string) remembered {
	return remembered{Request: request, Volume: id, Name: name, Expires: e.now().Add(keyLifetime)}
}

// recall reads a key from the store; nil if it never became durable, or if what it
// was to make did not come to be.
func (e *Engine) recall(key string) *remembered {
	var found *remembered
	_ = e.o.Store.View(func(tx *metadata.Tx) error { // an unreadable key is an unknown one
		r, err := idempotencyTable.Get(tx, key)
		if err != nil {
			return err
		}
		_, volume := e.catalog.get(r.Volume)
		_, snapshot := e.snapshots.get(r.Volume)
		if volume || snapshot {
			found = &r
		}
		return nil
	})
	return found
}

// requestDigest identifies what was asked, whoever asked it.
func requestDigest(r CreateVolume) string {
	r.IdempotencyKey, r.Actor = "", ""
	return digestOf(r)
}

func digestOf(request any) string {
	b, err := json.Marshal(request)
	if err != nil {
		panic(err) // strings, maps of strings and numbers always marshal
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// forgetKeys drops keys that are older than their lifetime.
func (e *Engine) forgetKeys(ctx context.Context) error {
	return e.dropKeys(ctx, e.keys.expired(e.now()))
}

func (e *Engine) dropKeys(ctx context.Context, keys []string) error {
	if len(keys) == 0 {
		return nil
	}
	err := e.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error {
		for _, key := range keys {
			if err := idempotencyTable.Delete(tx, key); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		e.keys.forget(keys)
	}
	return err
}

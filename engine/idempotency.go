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
	Volume  blockdev.ID `json:"volume"`
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

func (k *idempotency) forget(keys []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range keys {
		delete(k.known, key)
	}
}

// createOnce gives the same answer to the same request under the same key.
func (e *Engine) createOnce(ctx context.Context, r CreateVolume) (Volume, error) {
	if len(r.IdempotencyKey) > maxKeyLength {
		return Volume{}, problem(ErrInvalid, "Idempotency-Key", "must be at most %d bytes", maxKeyLength)
	}
	sum := sha256.Sum256([]byte(r.IdempotencyKey))
	key := r.Workspace + "/" + hex.EncodeToString(sum[:])
	old, known, leave, err := e.keys.enter(ctx, key, e.now())
	if err != nil {
		return Volume{}, err
	}
	if known {
		defer leave(nil)
		return e.replay(old, r)
	}
	v, err := e.create(ctx, r, key)
	if err != nil {
		// A caller that left early does not know the outcome: the intent, if it
		// became durable, is read back.
		leave(e.recall(key))
		return Volume{}, err
	}
	learned := e.remember(v, r)
	leave(&learned)
	return v, nil
}

func (e *Engine) replay(old remembered, r CreateVolume) (Volume, error) {
	if old.Request != requestDigest(r) {
		return Volume{}, problem(ErrConflict, "Idempotency-Key", "was used for another request")
	}
	if v, ok := e.catalog.get(old.Volume); ok {
		return v, nil
	}
	return Volume{}, problem(ErrConflict, "Idempotency-Key", "its volume %q has been deleted since", old.Name)
}

func (e *Engine) remember(v Volume, r CreateVolume) remembered {
	return remembered{Request: requestDigest(r), Volume: v.ID, Name: v.Name, Expires: e.now().Add(keyLifetime)}
}

// recall reads a key from the store; nil if it never became durable, or if its
// volume did not come to be.
func (e *Engine) recall(key string) *remembered {
	var found *remembered
	_ = e.o.Store.View(func(tx *metadata.Tx) error { // an unreadable key is an unknown one
		r, err := idempotencyTable.Get(tx, key)
		if err != nil {
			return err
		}
		if _, ok := e.catalog.get(r.Volume); ok {
			found = &r
		}
		return nil
	})
	return found
}

// requestDigest identifies what was asked, whoever asked it.
func requestDigest(r CreateVolume) string {
	r.IdempotencyKey, r.Actor = "", ""
	b, err := json.Marshal(r)
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

package sparse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/overlay"
)

// farModelOf is a model without workers of one volume of a store.
func farModelOf(t *testing.T, store *farStore, size int64) (m *model, vol blockdev.ID) {
	t.Helper()
	cheapFlushes(t)
	allowed, err := overlay.ParsePrefixes([]string{store.URL + "/"})
	if err != nil {
		t.Fatal(err)
	}
	m = newModel(t, t.TempDir()+"/pool", func(p *Pool) { p.layers, p.reflinks, p.prefixes = true, false, allowed })
	rev, vol := blockdevtest.NewID(blockdev.PrefixRevision), blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(m.far(rev, store), m.fork(vol, rev, size)); err != nil {
		t.Fatal(err)
	}
	return m, vol
}

// partial answers a range with other bytes than those of the range that it says.
func partial(w http.ResponseWriter, r *http.Request, says string, content []byte) {
	if says == "" {
		says = strings.Replace(r.Header.Get("Range"), "=", " ", 1) + fmt.Sprintf("/%d", farSize)
	}
	w.Header().Set("Content-Range", says)
	w.WriteHeader(http.StatusPartialContent)
	_, _ = w.Write(content)
}

// TestStoreThatLies: whatever a store does, this process never reads other bytes than
// those that were digested, ends when it is told to and says why; and when the store is
// itself again all is there.
func TestStoreThatLies(t *testing.T) {
	blockdevtest.LeakCheck(t)
	content, _ := farBytes()
	store := newFarStore(t, content)
	elsewhere := newFarStore(t, content)
	for what, c := range map[string]struct {
		answer http.HandlerFunc
		says   string // of the reason

		redirects int64 // requests of one try, where they are more than one
	}{
		"other bytes": {answer: func(w http.ResponseWriter, r *http.Request) {
			partial(w, r, "", bytes.Repeat([]byte{66}, farSize))
		}, says: "is not what it should be"},
		"zeroes":        {answer: func(w http.ResponseWriter, r *http.Request) { partial(w, r, "", make([]byte, farSize)) }, says: "is not what it should be"},
		"an early end":  {answer: func(w http.ResponseWriter, r *http.Request) { partial(w, r, "", content[:10]) }, says: "ends early"},
		"another range": {answer: func(w http.ResponseWriter, r *http.Request) { partial(w, r, "bytes 0-1/2", content) }, says: "were asked for"},
		"all of it":     {answer: func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(content) }, says: "status 200"},
		"unwell":        {answer: down, says: "status 503"},
		"no such base":  {answer: http.NotFound, says: "status 404"},
		"another host": {answer: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path+"?signature="+farSecret, http.StatusFound)
		}, says: "not below a prefix"},
		"round in circles": {answer: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path+"?signature="+farSecret, http.StatusFound)
		}, says: "redirects without end", redirects: 4},
	} {
		t.Run(what, func(t *testing.T) {
			m, vol := farModelOf(t, store, farModel)
			defer store.do(nil)
			reading, cancel := context.WithCancel(t.Context())
			defer cancel()
			b, err := m.pool.Access(reading, vol, false)
			if err != nil {
				t.Fatal(err)
			}
			store.do(endAfter(max(1, c.redirects), cancel, c.answer))
			p := bytes.Repeat([]byte{7}, modelBlock)
			_, err = b.ReadAt(p, modelBlock)
			explained(t, err, c.says)
			if !bytes.Equal(p, bytes.Repeat([]byte{7}, modelBlock)) {
				t.Error("the reader was given something")
			}
			if _, err := b.WriteAt(p[:100], 2*modelBlock); err == nil { // needs the rest of the block
				t.Error("a part of a block was written without the rest")
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			flattening, cancelFlatten := context.WithCancel(t.Context())
			defer cancelFlatten()
			store.do(endAfter(max(1, c.redirects), cancelFlatten, c.answer))
			err = m.pool.Flatten(flattening, vol)
			explained(t, err, c.says)
			store.do(nil)
			m.check("when the store is itself again", "", "")
			if err := m.pool.Flatten(t.Context(), vol); err != nil {
				t.Fatal(err)
			}
			store.do(down)
			m.compare("flat", vol, m.images[vol])
		})
	}
	if n := elsewhere.requests.Load(); n != 0 {
		t.Errorf("another host was asked %d times", n)
	}
}

// endAfter has who asks be told to end when it asks again after so many requests.
func endAfter(requests int64, end func(), answer http.HandlerFunc) http.HandlerFunc {
	var asked atomic.Int64
	return func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) > requests {
			end()
		}
		answer(w, r)
	}
}

// explained fails for an error that is not one of a store, tells a secret or does not
// say why.
func explained(t *testing.T, err error, why string) {
	t.Helper()
	switch {
	case !errors.Is(err, blockdev.ErrUnreachable) || !errors.Is(err, context.Canceled) || errors.Is(err, blockdev.ErrCorrupt):
		t.Errorf("it fails with %v", err)
	case !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), "/base"):
		t.Errorf("%v does not say %q of the store", err, why)
	case strings.Contains(err.Error(), farSecret) || strings.Contains(err.Error(), "signature"):
		t.Errorf("%v has a secret in it", err)
	}
}

// TestStoreThatHangs: who waits is let go when its context ends, also where a store
// accepts and says nothing, or is not there at all.
func TestStoreThatHangs(t *testing.T) {
	blockdevtest.LeakCheck(t)
	content, _ := farBytes()
	store := newFarStore(t, content)
	m, vol := farModelOf(t, store, farModel)
	var once sync.Once
	begun := make(chan struct{})
	store.do(func(_ http.ResponseWriter, r *http.Request) {
		once.Do(func() { close(begun) })
		select {
		case <-r.Context().Done():
		case <-store.ended:
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	if err := m.pool.Flatten(ctx, vol); !errors.Is(err, context.Canceled) {
		t.Errorf("flatten: %v", err)
	}
	late, done := context.WithTimeout(t.Context(), 1)
	defer done()
	if b, err := m.pool.Access(late, vol, true); err == nil {
		_, err = b.ReadAt(make([]byte, modelBlock), 0)
		if !errors.Is(err, blockdev.ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a read whose time is over: %v", err)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	store.do(nil)
	m.check("when it answers", "", "")
}

// TestFlattenGoesOn: what was fetched before Flatten was cut is not fetched again.
func TestFlattenGoesOn(t *testing.T) {
	blockdevtest.LeakCheck(t)
	const mib = 1 << 20
	content := make([]byte, 24*mib)
	for i := range 24 {
		content[i*mib] = byte(1 + i)
	}
	store := newFarStore(t, content)
	m, vol := farModelOf(t, store, 24*mib)
	last := fmt.Sprintf("bytes=%d-", 23*mib)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	store.do(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.Header.Get("Range"), last) {
			cancel()
			<-r.Context().Done()
			return
		}
		store.right(w, r)
	})
	if err := m.pool.Flatten(ctx, vol); !errors.Is(err, context.Canceled) {
		t.Fatalf("%v", err)
	}
	info, err := m.pool.Stat(t.Context(), vol)
	if err != nil || info.Absent == 0 || info.Absent > 20*modelBlock {
		t.Errorf("%d bytes are absent of 24 blocks, %v", info.Absent, err)
	}
	before := store.requests.Load()
	store.do(nil)
	if err := m.pool.Flatten(t.Context(), vol); err != nil {
		t.Fatal(err)
	}
	if n := store.requests.Load() - before; n*modelBlock != info.Absent {
		t.Errorf("%d blocks were fetched where %d bytes were absent", n, info.Absent)
	}
	got, err := os.ReadFile(m.pool.image(vol) + "/" + imageFile)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes are not those of the store, %v", len(got), err)
	}
}

// TestDamagedChunks: an image whose chunks are not those that its chain names is
// quarantined, and never reads as something else. The store would give anything.
func TestDamagedChunks(t *testing.T) {
	blockdevtest.LeakCheck(t)
	content, _ := farBytes()
	store, other := newFarStore(t, content), newFarStore(t, bytes.Repeat([]byte{9}, farSize))
	for what, spoil := range map[string]func(m *model, path string) error{
		"missing": func(_ *model, path string) error { return os.Remove(path) },
		"short": func(_ *model, path string) error {
			return replaceFile(path, func(b []byte) []byte { return b[:len(b)-32] })
		},
		"none": func(_ *model, path string) error {
			return replaceFile(path, func([]byte) []byte { return nil })
		},
		"a bit": func(_ *model, path string) error {
			return replaceFile(path, func(b []byte) []byte { b[100] ^= 1; return b })
		},
		"longer": func(_ *model, path string) error {
			return replaceFile(path, func(b []byte) []byte { return append(b, 0) })
		},
		"another base's": func(m *model, path string) error {
			base := other.base(m.t)
			return replaceFile(path, func([]byte) []byte { return readAll(m.t, base.Chunks) })
		},
		"in place": func(_ *model, path string) error { // one file for both images
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte{1}, 200)
			return errors.Join(err, f.Close())
		},
	} {
		t.Run(what, func(t *testing.T) {
			m, vol := farModelOf(t, store, farModel)
			if err := m.write(vol, 3, 5); err != nil {
				t.Fatal(err)
			}
			c, err := readChain(vol, m.pool.image(vol))
			if err != nil || !c.far() {
				t.Fatalf("%+v, %v", c, err)
			}
			if err := spoil(m, m.pool.image(vol)+"/"+c.Base); err != nil {
				t.Fatal(err)
			}
			asked := store.requests.Load()
			if _, err := m.pool.Stat(t.Context(), vol); !errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("stat: %v", err)
			}
			if b, err := m.pool.Access(t.Context(), vol, true); !errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("access: %v", err)
				if err == nil {
					b.Close()
				}
			}
			bounded, cancel := context.WithTimeout(t.Context(), time.Minute) // only of one that goes wrong
			defer cancel()
			if err := m.pool.Flatten(bounded, vol); !errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("flatten: %v", err)
			}
			infos, err := m.pool.List(t.Context())
			if err != nil || len(infos) > 1 || len(infos) == 1 && infos[0].ID == vol {
				t.Errorf("listed %+v, %v", infos, err)
			}
			if found, err := m.pool.Quarantined(t.Context()); err != nil || len(found) != 2-len(infos) || strings.Contains(fmt.Sprint(found), farSecret) {
				t.Errorf("quarantined %+v, %v", found, err)
			}
			if store.requests.Load() != asked {
				t.Error("the store was asked")
			}
		})
	}
}

// replaceFile makes another file of a file, without a part in other names of it.
func replaceFile(path string, change func([]byte) []byte) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return errors.Join(os.Remove(path), os.WriteFile(path, change(b), 0o600))
}

// TestCreateRemoteRefuses: what is no base makes no draft.
func TestCreateRemoteRefuses(t *testing.T) {
	blockdevtest.LeakCheck(t)
	cheapFlushes(t)
	content, _ := farBytes()
	store := newFarStore(t, content)
	m := newModel(t, t.TempDir()+"/pool", func(p *Pool) { p.layers, p.reflinks = true, false })
	for what, c := range map[string]struct {
		spoil func(*blockdev.RemoteBase)
		is    error
	}{
		"another digest": {func(b *blockdev.RemoteBase) { b.Digest[3] ^= 1 }, blockdev.ErrCorrupt},
		"no chunks":      {func(b *blockdev.RemoteBase) { b.Chunks = strings.NewReader("") }, blockdev.ErrCorrupt},
		"half of them":   {func(b *blockdev.RemoteBase) { b.Chunks = bytes.NewReader(readAll(t, b.Chunks)[:90]) }, blockdev.ErrCorrupt},
		"something else": {func(b *blockdev.RemoteBase) {
			b.Chunks, b.Digest = strings.NewReader("hello"), [32]byte{0x2c, 0xf2, 0x4d, 0xba, 0x5f, 0xb0, 0xa3, 0x0e, 0x26, 0xe8, 0x3b, 0x2a, 0xc5, 0xb9, 0xe2, 0x9e, 0x1b, 0x16, 0x1e, 0x5c, 0x1f, 0xa7, 0x42, 0x5e, 0x73, 0x04, 0x33, 0x62, 0x93, 0x8b, 0x98, 0x24}
		}, blockdev.ErrCorrupt},
		"no address":   {func(b *blockdev.RemoteBase) { b.URL = "" }, blockdev.ErrInvalid},
		"a path":       {func(b *blockdev.RemoteBase) { b.URL = "/etc/passwd" }, blockdev.ErrInvalid},
		"a file":       {func(b *blockdev.RemoteBase) { b.URL = "file:///etc/passwd?" + farSecret }, blockdev.ErrInvalid},
		"no host":      {func(b *blockdev.RemoteBase) { b.URL = "http:///base" }, blockdev.ErrInvalid},
		"broken":       {func(b *blockdev.RemoteBase) { b.URL = "http://x/%zz" + farSecret }, blockdev.ErrInvalid},
		"far too long": {func(b *blockdev.RemoteBase) { b.URL += strings.Repeat("x", 5000) }, blockdev.ErrInvalid},
	} {
		t.Run(what, func(t *testing.T) {
			base := store.base(t)
			c.spoil(&base)
			id := blockdevtest.NewID(blockdev.PrefixRevision)
			if err := m.pool.CreateRemote(t.Context(), id, base); !errors.Is(err, c.is) || strings.Contains(err.Error(), farSecret) {
				t.Errorf("%v", err)
			}
			if _, err := m.pool.Stat(t.Context(), id); !errors.Is(err, blockdev.ErrNotFound) {
				t.Errorf("there is something: %v", err)
			}
		})
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	id := blockdevtest.NewID(blockdev.PrefixRevision)
	if err := m.pool.CreateRemote(ended, id, store.base(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
	if err := m.far(id, store); err != nil {
		t.Fatal(err)
	}
	if err := m.pool.CreateRemote(t.Context(), id, store.base(t)); !errors.Is(err, blockdev.ErrExists) {
		t.Errorf("a published image was made again: %v", err)
	}
	m.pool.layers = false
	if err := m.pool.CreateRemote(t.Context(), blockdevtest.NewID(blockdev.PrefixRevision), store.base(t)); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("without workers: %v", err)
	}
	m.pool.layers = true
	m.check("at the end", "", "")
	m.tidy("at the end")
}

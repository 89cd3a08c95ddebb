package sparse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/overlay"
)

// farSecret is in the address of every store of the tests, and nowhere else.
const farSecret = "s3cr3t"

// farStore is a store with one base, which can be made to fail.
type farStore struct {
	*httptest.Server
	bytes    []byte
	requests atomic.Int64
	answer   atomic.Pointer[http.HandlerFunc] // instead of the right one
	ended    chan struct{}
}

func newFarStore(t *testing.T, content []byte) *farStore {
	t.Helper()
	s := &farStore{bytes: content, ended: make(chan struct{})}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.requests.Add(1)
		if fail := s.answer.Load(); fail != nil {
			(*fail)(w, r)
			return
		}
		s.right(w, r)
	}))
	t.Cleanup(func() {
		close(s.ended)
		s.Close()
	})
	return s
}

func (s *farStore) right(w http.ResponseWriter, r *http.Request) {
	http.ServeContent(w, r, "base", time.Time{}, bytes.NewReader(s.bytes))
}

// do has it answer otherwise; nil: rightly.
func (s *farStore) do(answer http.HandlerFunc) {
	if answer == nil {
		s.answer.Store(nil)
		return
	}
	s.answer.Store(&answer)
}

// down is the answer of a store that is not well.
func down(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "not now", http.StatusServiceUnavailable)
}

// base describes what the store has, in chunks of a block.
func (s *farStore) base(t *testing.T) blockdev.RemoteBase {
	t.Helper()
	var file bytes.Buffer
	chunks, err := overlay.Digest(bytesSource{bytes.NewReader(s.bytes)}, overlay.BlockSize)
	if err == nil {
		err = overlay.WriteChunks(&file, chunks)
	}
	if err != nil {
		t.Fatal(err)
	}
	address := strings.Replace(s.URL, "http://", "http://user:"+farSecret+"@", 1) + "/base?signature=" + farSecret
	return blockdev.RemoteBase{URL: address, Digest: sha256.Sum256(file.Bytes()), Chunks: &file}
}

func readAll(t *testing.T, r io.Reader) []byte {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

type bytesSource struct{ *bytes.Reader }

func (s bytesSource) Next(off int64) (from, to int64, err error) {
	if off >= s.Size() {
		return 0, 0, io.EOF
	}
	return off, s.Size(), nil
}

// farSize is what the model's base holds, in bytes, and farModel the size of an image of
// it.
const (
	farModel = 320 * modelBlock
	farSize  = farModel - modelBlock + 1024
)

// farBytes are those of the model's base: some blocks hold something.
func farBytes() (content []byte, blocks map[int64]byte) {
	content, blocks = make([]byte, farSize), map[int64]byte{}
	for _, n := range []int64{0, 1, 2, 3, 60, 300, 301} {
		blocks[n] = byte(100 + n%100)
		copy(content[n*modelBlock:], bytes.Repeat([]byte{blocks[n]}, modelBlock))
	}
	return content, blocks
}

// far makes and publishes an image of a store's bytes.
func (m *model) far(id blockdev.ID, s *farStore) error {
	if m.images[id] != nil {
		return nil
	}
	if err := m.unlessThere(id, func() error { return m.pool.CreateRemote(m.t.Context(), id, s.base(m.t)) }); err != nil {
		return err
	}
	_, blocks := farBytes()
	m.images[id] = &modelImage{farModel, blocks}
	return nil
}

// TestRemoteStory cuts the life of images whose base is far away at every point between
// two side effects, as TestLayeredStory does.
func TestRemoteStory(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	base := t.TempDir()
	content, _ := farBytes()
	store := newFarStore(t, content)
	points := map[string]bool{}
	for _, crash := range []bool{true, false} {
		for cut := 0; ; cut++ {
			point := remoteStory(t, filepath.Join(base, fmt.Sprintf("%d-%v", cut, crash)), store, cut, crash)
			if point == "" {
				break
			}
			points[point] = true
		}
	}
	for _, point := range []string{"draft.links", "draft.layer", "draft.chain", "describe.rename", "publish.rename", "seal.layer", "seal.record",
		"flatten.absorb", "flatten.hydrate", "flat.link", "flat.unchain", "flat.sweep", "grow.flush", "remove.rename"} {
		if !points[point] {
			t.Errorf("no story was cut at %s", point)
		}
	}
}

func remoteStory(t *testing.T, dir string, store *farStore, cut int, crash bool) (cutAt string) {
	t.Helper()
	rev, empty, snap := blockdevtest.NewID(blockdev.PrefixRevision), blockdevtest.NewID(blockdev.PrefixSnapshot), blockdevtest.NewID(blockdev.PrefixSnapshot)
	vol, fork, third := blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume)
	setup := func(p *Pool) { p.layers, p.reflinks = true, false }
	return cutStory(t, dir, setup, cut, crash, func(m *model) []storyStep {
		flatten := func(id blockdev.ID) func() error {
			return func() error { return m.pool.Flatten(t.Context(), id) }
		}
		return []storyStep{
			{"", func() error { return m.far(rev, store) }},
			{"", func() error { return m.fork(vol, rev, farModel) }},
			{"", func() error { return m.snapshot(empty, vol) }}, // of a top without a write
			{"", func() error { return m.write(vol, 2, 1, 10) }},
			{"", func() error { return m.snapshot(snap, vol) }},
			{"", func() error { return m.fork(fork, snap, farModel+4*modelBlock) }},
			{"", func() error { return m.pool.SetAddress(t.Context(), rev, store.moveTo(t)) }}, // to where it is
			{"", func() error { return m.write(fork, 4, 3, 12, 321) }},
			{vol, func() error { return m.grow(vol, farModel+2*modelBlock) }},
			{"", func() error { return m.flattenPart(rev, store) }},
			{"", func() error { return m.fork(third, rev, farModel) }},
			{snap, func() error { return m.remove(snap) }},
			{"", flatten(vol)},
			{"", flatten(rev)},
			{"", func() error { return m.write(third, 6, 301) }},
			{rev, func() error { return m.remove(rev) }},
			{"", flatten(third)},
			{"", flatten(fork)},
		}
	})
}

// flattenPart begins to make an image flat until the store is asked for what it has
// behind the first MiB.
func (m *model) flattenPart(id blockdev.ID, s *farStore) error {
	ctx, cancel := context.WithCancel(m.t.Context())
	defer cancel()
	s.do(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.Header.Get("Range"), fmt.Sprintf("bytes=%d-", 300*modelBlock)) {
			s.right(w, r)
			return
		}
		cancel()
		<-r.Context().Done()
	})
	defer s.do(nil)
	err := m.pool.Flatten(ctx, id)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	if err == nil {
		err = errors.New("it is flat though the store did not give all")
	}
	return err
}

// TestRemoteBaseServed: volumes of one base that is far away are used at once at
// workers, become flat while they are, and then open as plain files without the store.
func TestRemoteBaseServed(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m, _ := servedModel(t, nil)
	content, _ := farBytes()
	store := newFarStore(t, content)
	rev := blockdevtest.NewID(blockdev.PrefixRevision)
	if err := m.far(rev, store); err != nil {
		t.Fatal(err)
	}
	if store.requests.Load() != 0 {
		t.Error("making an image asks the store")
	}
	info, err := m.pool.Stat(ctx, rev)
	if err != nil || info.Size != farModel || info.Layers != 1 || info.Absent != 7*modelBlock {
		t.Errorf("%+v, %v", info, err)
	}
	vols := []blockdev.ID{blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume)}
	store.do(down) // first of all the volumes are there
	var leases []string
	for i, vol := range vols {
		if err := m.fork(vol, rev, farModel+int64(i)*modelBlock); err != nil {
			t.Fatal(err)
		}
		e, err := m.pool.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
		if err != nil {
			t.Fatal(err)
		}
		leases = append(leases, e.Lease)
		client := blockdevtest.DialNBD(t, e.Path)
		if err := m.put(client, vol, byte(7+i), 1, 30); err != nil {
			t.Fatal(err)
		}
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
		await(t, "the worker tells why it waits", func() bool {
			s, err := m.pool.Observe(ctx, vol)
			return err == nil && s.Layers.Reason != ""
		})
		if s, err := m.pool.Observe(ctx, vol); err != nil || !strings.Contains(s.Layers.Reason, "503") || strings.Contains(fmt.Sprintf("%+v", s.Layers), farSecret) {
			t.Errorf("it tells %+v, %v", s.Layers, err)
		}
	}
	store.do(nil)
	for i, vol := range vols {
		await(t, "all has been fetched", func() bool {
			s, err := m.pool.Observe(ctx, vol)
			return err == nil && s.Layers.Held == s.Layers.Size
		})
		if err := m.pool.Close(ctx, vol, leases[i]); err != nil {
			t.Fatal(err)
		}
	}
	store.do(down)
	for _, vol := range vols {
		e, err := m.pool.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.File}})
		if err != nil || filepath.Base(e.Path) != imageFile {
			t.Fatalf("%+v, %v", e, err)
		}
		if err := m.pool.Close(ctx, vol, e.Lease); err != nil {
			t.Fatal(err)
		}
	}
	store.do(nil)
	m.check("at the end", "", "")
	if err := os.Remove(m.pool.image(rev) + "/" + traceFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	m.tidy("at the end")
}

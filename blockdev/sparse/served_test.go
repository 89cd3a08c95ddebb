package sparse

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/control"
	"holdfast/internal/run"
)

// blockd is the worker's program, built once for all tests.
var blockd = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "blockd")
	if err != nil {
		return "", err
	}
	blockdDir = dir
	path := filepath.Join(dir, "holdfast-blockd")
	_, err = run.Run(context.Background(), run.Cmd{
		Args: []string{"go", "build", "-buildvcs=false", "-o", path, "holdfast/cmd/holdfast-blockd"},
		Env:  append(os.Environ(), "CGO_ENABLED=0"),
	})
	return path, err
})

var blockdDir string // removed when all tests have ended

// workersFor gives workers that go with the test.
func workersFor(t *testing.T) *control.Starter {
	t.Helper()
	path, err := blockd()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "w") // a socket's address is short
	if err != nil {
		t.Fatal(err)
	}
	s, err := control.New(control.Options{Program: path, Dir: dir, Log: os.Stderr, DieWithParent: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ids, err := s.List(context.Background())
		if err != nil {
			t.Error(err)
		}
		for _, id := range ids {
			if err := s.Kill(context.Background(), id); err != nil { // also one that stands still
				t.Error(err)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return s
}

// TestBackendServed holds the pool to the contract with workers.
func TestBackendServed(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.ReflinkPool, blockdevtest.Ext4)
	for name, dir := range map[string]func(t testing.TB, o ...blockdevtest.DirOption) string{"layered": blockdevtest.Ext4Dir, "reflink": blockdevtest.ReflinkDir} {
		t.Run(name, func(t *testing.T) {
			cheapFlushes(t)
			blockdevtest.LeakCheck(t)
			base := dir(t)
			blockdevtest.TestBackend(t, func(t *testing.T) blockdevtest.Place {
				return servedPlace(t, filepath.Join(base, filepath.Base(t.Name())), name == "layered")
			})
		})
	}
}

func servedPlace(t *testing.T, dir string, layered bool) blockdevtest.Place {
	k := keep(t, dir)
	workers := workersFor(t)
	return blockdevtest.Place{
		Open: func(t *testing.T) blockdev.Backend {
			k.close()
			p, err := Open(t.Context(), dir, Options{Host: "test", Rate: -1, Workers: workers})
			if err != nil {
				t.Fatal(err)
			}
			k.pool = p
			return p
		},
		Damage: func(t *testing.T, id blockdev.ID) {
			path := filepath.Join(dir, imagesDir, string(id), descriptionFile)
			content, err := os.ReadFile(path)
			if err == nil {
				content[len(content)-2] ^= 1
				err = os.WriteFile(path, content, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		Access: func(t *testing.T, e blockdev.Endpoint) blockdevtest.File {
			if e.Kind == blockdev.NBD {
				return blockdevtest.DialNBD(t, e.Path)
			}
			f, err := os.OpenFile(e.Path, accessMode(e.ReadOnly), 0)
			if err != nil {
				t.Fatal(err)
			}
			return f
		},
		Kinds: []blockdev.Kind{blockdev.NBD, blockdev.Block}, Clones: true, Snapshots: true, Layered: layered,
	}
}

// servedModel is a model whose pool has workers.
func servedModel(t *testing.T, crash func(string) error) (*model, *control.Starter) {
	t.Helper()
	workers := workersFor(t)
	m := newModel(t, filepath.Join(t.TempDir(), "pool"), func(p *Pool) {
		p.layers, p.reflinks, p.crash = true, false, crash
	})
	m.workers = workers
	m.reopen()
	return m, workers
}

// TestWorkerDies: the opening stays, Open starts another worker at the same socket,
// and nothing that was flushed is lost; also where the pool has been opened anew in
// between, with a seal that nobody has settled.
func TestWorkerDies(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m, workers := servedModel(t, nil)
	vol := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(m.create(vol), m.write(vol, 1, 0, 1, 2, 3)); err != nil {
		t.Fatal(err)
	}
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}, Limits: blockdev.Limits{ReadIOPS: 10000}}
	e, err := m.pool.Open(ctx, vol, want)
	if err != nil {
		t.Fatal(err)
	}
	put := func(fill byte, block int64) {
		t.Helper()
		f := blockdevtest.DialNBD(t, e.Path)
		_, err := f.WriteAt(bytes.Repeat([]byte{fill}, modelBlock), block*modelBlock)
		if err := errors.Join(err, f.(interface{ Sync() error }).Sync(), f.Close()); err != nil { //nolint:forcetypeassert // it can
			t.Fatal(err)
		}
		m.images[vol].blocks[block] = fill
	}
	put(2, 1)
	snap := blockdevtest.NewID(blockdev.PrefixSnapshot)
	if err := m.snapshot(snap, vol); err != nil {
		t.Fatal(err)
	}
	put(3, 2)
	for _, reopen := range []bool{false, true} {
		waiting, cancel := context.WithCancel(ctx)
		cancel()
		if err := m.pool.AwaitEnd(waiting, vol); err == nil {
			t.Error("a worker that lives has ended")
		}
		ended := make(chan error, 1)
		go func() { ended <- m.pool.AwaitEnd(ctx, vol) }()
		w, err := workers.Find(ctx, vol)
		if err == nil {
			err = w.Kill(ctx)
		}
		if err = errors.Join(err, <-ended); err != nil {
			t.Fatal(err)
		}
		if reopen {
			m.reopen()
		}
		if info, err := m.pool.Stat(ctx, vol); err != nil || !info.Open || info.Layers != 1 {
			t.Errorf("with a dead worker: %+v, %v", info, err)
		}
		if _, err := m.pool.Observe(ctx, vol); !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("observed a dead worker: %v", err)
		}
		want.Limits.ReadIOPS++
		again, err := m.pool.Open(ctx, vol, want)
		if err != nil || again != e {
			t.Fatalf("opened again: %+v, %v; want %+v", again, err, e)
		}
		if s, err := m.pool.Observe(ctx, vol); err != nil || s.Limits != want.Limits {
			t.Errorf("the next worker has limits %+v, %v", s.Limits, err)
		}
		put(4, 3)
	}
	s, err := m.pool.Observe(ctx, vol)
	if err != nil || s.Layers == nil || s.Pid == 0 {
		t.Errorf("observed %+v, %v", s, err)
	}
	limits := blockdev.Limits{ReadIOPS: 100_000}
	if err := m.pool.Throttle(ctx, vol, limits); err != nil {
		t.Error(err)
	}
	if s, err := m.pool.Observe(ctx, vol); err != nil || s.Limits != limits {
		t.Errorf("throttled: %+v, %v", s, err)
	}
	if c, err := m.pool.Counters(ctx, vol); err != nil || c.Writes != 1 || c.WriteBytes != modelBlock || c.Since.IsZero() {
		t.Errorf("counted %+v, %v", c, err)
	}
	if err := m.pool.Grow(ctx, vol, modelSize+modelBlock); err != nil {
		t.Fatal(err)
	}
	m.images[vol].size += modelBlock
	put(5, modelSize/modelBlock)
	if err := m.pool.Close(ctx, vol, e.Lease); err != nil {
		t.Fatal(err)
	}
	next, err := m.pool.Open(ctx, vol, want)
	if err != nil || next.Path == e.Path || next.Lease == e.Lease {
		t.Errorf("who had it before and connects again meets who has it next: %+v after %+v, %v", next, e, err)
	}
	if err := m.pool.Close(ctx, vol, next.Lease); err != nil {
		t.Fatal(err)
	}
	m.check("at the end", "", "")
	m.tidy("at the end")
}

// TestServedSealCut: a snapshot of a served image that is cut at any point, by a crash
// of this process or an error, leaves a volume that goes on, with all its bytes.
func TestServedSealCut(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	points := map[string]bool{}
	for cut := 0; ; cut++ {
		passed, cutAt, armed := 0, "", false
		m, _ := servedModel(t, func(point string) error {
			if !armed {
				return nil
			}
			if passed++; passed == cut+1 {
				cutAt = point
				return errCut
			}
			return nil
		})
		src, vol := blockdevtest.NewID(blockdev.PrefixSource), blockdevtest.NewID(blockdev.PrefixVolume)
		if err := errors.Join(m.create(src), m.write(src, 1, 0, 1, 2), m.fork(vol, src, modelSize)); err != nil {
			t.Fatal(err)
		}
		armed = true
		failed := false
		do := func(what string, once func() error) {
			t.Helper()
			err := once()
			if errors.Is(err, errCut) || err != nil && cutAt != "" && !failed { // it comes from the worker as words
				failed = true
				m.reopen()
				err = once()
			}
			if err != nil {
				t.Fatalf("cut %d at %s: %s: %v", cut, cutAt, what, err)
			}
		}
		var e blockdev.Endpoint
		open := func() (err error) {
			e, err = m.pool.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
			return err
		}
		do("open", open)
		f := blockdevtest.DialNBD(t, e.Path)
		if _, err := f.WriteAt(bytes.Repeat([]byte{7}, modelBlock), modelBlock); err != nil {
			t.Fatal(err)
		}
		if err := f.(interface{ Sync() error }).Sync(); err != nil { //nolint:forcetypeassert // it can
			t.Fatal(err)
		}
		m.images[vol].blocks[1] = 7
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		snap := blockdevtest.NewID(blockdev.PrefixSnapshot)
		do("snapshot", func() error {
			// A record that failed has failed the volume: its worker is ended and begins anew.
			if s, err := m.pool.Observe(ctx, vol); err == nil && s.Failed != "" {
				if err := m.pool.Close(ctx, vol, e.Lease); err != nil && !errors.Is(err, blockdev.ErrFailed) {
					return err
				}
				if err := open(); err != nil {
					return err
				}
			}
			return m.snapshot(snap, vol)
		})
		do("close", func() error { return m.pool.Close(ctx, vol, e.Lease) })
		do("flatten", func() error { return m.pool.Flatten(ctx, vol) })
		armed = false
		m.check("cut at "+cutAt, "", "")
		m.tidy("cut at " + cutAt)
		if cutAt == "" {
			break
		}
		points[cutAt] = true
	}
	for _, point := range []string{"open.worker", "seal.layer", "seal.base", "seal.record", "draft.links", "close.flush", "close.settle"} {
		if !points[point] {
			t.Errorf("it was not cut at %s", point)
		}
	}
}

// TestBackgroundFlattens: a closed layered volume becomes flat by itself, a snapshot
// never does.
func TestBackgroundFlattens(t *testing.T) {
	blockdevtest.LeakCheck(t)
	m, workers := servedModel(t, nil)
	src, vol, snap := blockdevtest.NewID(blockdev.PrefixSource), blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixSnapshot)
	if err := errors.Join(m.create(src), m.write(src, 1, 0, 1, 2), m.fork(vol, src, modelSize), m.write(vol, 2, 5), m.snapshot(snap, vol)); err != nil {
		t.Fatal(err)
	}
	m.kept.close()
	p, err := Open(t.Context(), m.kept.dir, Options{Workers: workers, Rate: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	m.kept.pool, m.pool = p, p
	await(t, "the volume is flat", func() bool {
		info, err := p.Stat(t.Context(), vol)
		return err == nil && info.Layers == 0
	})
	if info, err := p.Stat(t.Context(), snap); err != nil || info.Layers != 1 || info.Absent <= 0 {
		t.Errorf("the snapshot: %+v, %v", info, err)
	}
	m.check("then", "", "")
}

// TestLayersWithoutClient: where the kernel has no NBD client a layered image is no block
// device, whoever asks for it, and nothing is left of the question; a flat one is a loop
// device.
func TestLayersWithoutClient(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m, workers := servedModel(t, nil)
	src, vol := blockdevtest.NewID(blockdev.PrefixSource), blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(m.create(src), m.write(src, 1, 0, 1, 2), m.fork(vol, src, modelSize)); err != nil {
		t.Fatal(err)
	}
	if m.pool.ServesLayers(ctx, vol) == nil {
		t.Skip("this kernel has an NBD client: see holdfastd/nbdguesttest")
	}
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}, Served: true}
	if _, err := m.pool.Open(ctx, vol, want); !errors.Is(err, blockdev.ErrLayered) {
		t.Errorf("opened: %v", err)
	}
	if ids, err := workers.List(ctx); err != nil || len(ids) != 0 {
		t.Errorf("workers %v, %v", ids, err)
	}
	if err := m.pool.Flatten(ctx, vol); err != nil {
		t.Fatal(err)
	}
	e, err := m.pool.Open(ctx, vol, want)
	if err != nil || e.Served || !strings.HasPrefix(e.Path, "/dev/loop") {
		t.Errorf("flat: %+v, %v", e, err)
	}
	if err := errors.Join(m.pool.Revive(ctx, vol, e.Lease), m.pool.Close(ctx, vol, e.Lease)); err != nil {
		t.Error(err)
	}
}

// TestLeaseOfAnEarlierOpening does not close a later one, at workers either.
func TestLeaseOfAnEarlierOpening(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m, _ := servedModel(t, nil)
	vol := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := m.create(vol); err != nil {
		t.Fatal(err)
	}
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.VhostUser, blockdev.File}}
	first, err := m.pool.Open(ctx, vol, want)
	if err == nil {
		err = m.pool.Close(ctx, vol, first.Lease)
	}
	second, openErr := m.pool.Open(ctx, vol, want)
	if err := errors.Join(err, openErr, m.pool.Close(ctx, vol, first.Lease)); err != nil {
		t.Fatal(err)
	}
	if second.Kind != blockdev.VhostUser || !strings.HasPrefix(second.Lease, "vhost-user-rw-") || second.Lease == first.Lease {
		t.Errorf("%+v after %+v", second, first)
	}
	if info, err := m.pool.Stat(ctx, vol); err != nil || !info.Open {
		t.Errorf("%+v, %v", info, err)
	}
	if err := m.pool.Sever(ctx, vol); err != nil {
		t.Fatal(err)
	}
	if info, err := m.pool.Stat(ctx, vol); err != nil || info.Open {
		t.Errorf("severed: %+v, %v", info, err)
	}
}

// TestServedChainStaysShort: layers that no snapshot needs any more are merged while
// the volume is in use.
func TestServedChainStaysShort(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m, workers := servedModel(t, nil)
	src, vol := blockdevtest.NewID(blockdev.PrefixSource), blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(m.create(src), m.write(src, 1, 0, 1, 2, 40), m.fork(vol, src, modelSize)); err != nil {
		t.Fatal(err)
	}
	m.kept.close()
	p, err := Open(ctx, m.kept.dir, Options{Workers: workers, Rate: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	p.reflinks = false
	m.kept.pool, m.pool = p, p
	e, err := p.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
	if err != nil {
		t.Fatal(err)
	}
	client := blockdevtest.DialNBD(t, e.Path)
	var snaps []blockdev.ID
	for i := range byte(4) {
		if err := m.put(client, vol, 10+i, int64(i), int64(i)+1, 40); err != nil {
			t.Fatal(err)
		}
		snaps = append(snaps, blockdevtest.NewID(blockdev.PrefixSnapshot))
		if err := m.snapshot(snaps[i], vol); err != nil {
			t.Fatal(err)
		}
	}
	kept := snaps[1]
	for _, id := range snaps {
		if id == kept {
			continue
		}
		if err := m.remove(id); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the chain is short", func() bool {
		info, err := p.Stat(ctx, vol)
		return err == nil && info.Layers == 3 // its top, and the two that a snapshot has
	})
	if err := m.put(client, vol, 20, 2, 41); err != nil {
		t.Fatal(err)
	}
	if err := m.remove(kept); err != nil {
		t.Fatal(err)
	}
	await(t, "the chain is shortest", func() bool {
		info, err := p.Stat(ctx, vol)
		return err == nil && info.Layers == 1
	})
	if err := errors.Join(client.Close(), p.Close(ctx, vol, e.Lease)); err != nil {
		t.Fatal(err)
	}
	m.check("at the end", "", "")
}

package lvm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/sys"
)

const block = 256 << 10

// pattern is what the n-th block of a test holds.
func pattern(n int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "block %07d...\n", n), block/17+1)[:block]
}

// writer writes blocks, each with a flush, and counts those that were acknowledged.
type writer interface {
	write(n int) error
	read(n int) ([]byte, error)
	end() error
	again() error // after a failure
}

// rawWriter writes to a volume's device.
type rawWriter struct{ path string }

func (w rawWriter) write(n int) error {
	f, err := os.OpenFile(w.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(pattern(n), int64(n)*block)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (w rawWriter) read(n int) ([]byte, error) {
	f, err := os.Open(w.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, block)
	_, err = f.ReadAt(b, int64(n)*block)
	return b, err
}

func (w rawWriter) end() error   { return nil }
func (w rawWriter) again() error { return nil }

// fileWriter writes files of a filesystem on a volume.
type fileWriter struct {
	t            *testing.T
	node, at, as string
}

func newFileWriter(t *testing.T, node, as, mkfs string) *fileWriter {
	t.Helper()
	w := &fileWriter{t, node, t.TempDir(), as}
	sh(t, mkfs+" "+node)
	if err := w.mount(); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *fileWriter) mount() error {
	sh(w.t, "mount -t "+w.as+" "+w.node+" "+w.at)
	return nil
}

func (w *fileWriter) name(n int) string { return filepath.Join(w.at, fmt.Sprint(n)) }

func (w *fileWriter) write(n int) error {
	f, err := os.Create(w.name(n))
	if err != nil {
		return err
	}
	_, err = f.Write(pattern(n))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	d, err := os.Open(w.at)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (w *fileWriter) read(n int) ([]byte, error) { return os.ReadFile(w.name(n)) }
func (w *fileWriter) end() error                 { sh(w.t, "umount "+w.at); return nil }
func (w *fileWriter) again() error               { return errors.Join(w.end(), w.mount()) }

// TestFullPool fills a pool to the brim: what does not fit is refused, what was
// acknowledged is there when the pool has got more space, and until then images can
// be described and removed.
func TestFullPool(t *testing.T) {
	for _, c := range []struct{ name, size, as, mkfs string }{
		{"device", "56m", "", ""},
		{"ext4", "56m", "ext4", "mkfs.ext4 -q -m 0 -J size=4"},
		{"xfs", "120m", "xfs", "mkfs.xfs -q -f -K"}, // its log has 64 MiB
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t, c.size)
			sh(t, "lvchange -qq --errorwhenfull y "+p.name) // they wait in TestExtendsItself
			pool := p.open(t)
			other := published(t, pool, 1<<20)
			id := published(t, pool, 512<<20)
			e, err := pool.Open(t.Context(), id, anyBlock)
			if err != nil {
				t.Fatal(err)
			}
			var w writer = rawWriter{e.Path}
			if c.as != "" {
				w = newFileWriter(t, e.Path, c.as, c.mkfs)
			}
			acknowledged := fill(t, w, 0)
			fullPool(t, pool, other)
			sh(t, "lvextend -qq -L +16m "+p.name)
			if err := w.again(); err != nil {
				t.Fatal(err)
			}
			if err := w.write(acknowledged); err != nil {
				t.Errorf("after the pool has got more space: %v", err)
			}
			for n := range acknowledged + 1 {
				if b, err := w.read(n); err != nil || !bytes.Equal(b, pattern(n)) {
					t.Errorf("block %d of %d, acknowledged, is lost: %v", n, acknowledged, err)
				}
			}
			if err := errors.Join(w.end(), pool.Close(t.Context(), id, e.Lease)); err != nil {
				t.Error(err)
			}
		})
	}
}

// fill writes until it fails, and tells how many blocks were acknowledged.
func fill(t *testing.T, w writer, from int) int {
	t.Helper()
	for n := from; n < 1024; n++ {
		if err := w.write(n); err != nil {
			t.Logf("block %d: %v", n, err)
			if n < 16 {
				t.Errorf("full after %d blocks", n)
			}
			return n
		}
	}
	t.Fatal("the pool does not fill")
	return 0
}

// fullPool holds a pool without a free block to what it can still do.
func fullPool(t *testing.T, pool *Pool, other blockdev.ID) {
	t.Helper()
	ctx := t.Context()
	if h, err := pool.Health(ctx); err != nil || h.State != blockdev.PoolFull || !strings.Contains(h.Reason, "lvextend") || h.Data.Used != h.Data.Total {
		t.Errorf("health of a full pool: %+v, %v", h, err)
	}
	if c, err := pool.Capacity(ctx); err != nil || c.Free != 0 {
		t.Errorf("capacity of a full pool: %+v, %v", c, err)
	}
	err := pool.Create(ctx, blockdevtest.NewID(blockdev.PrefixVolume), 1<<20)
	if !errors.Is(err, blockdev.ErrNoSpace) || !strings.Contains(err.Error(), "lvextend") {
		t.Errorf("create in a full pool: %v", err)
	}
	if err := pool.Clone(ctx, blockdevtest.NewID(blockdev.PrefixVolume), other, 1<<20); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("clone in a full pool: %v", err)
	}
	if err := pool.Describe(ctx, other, []byte("described in a full pool")); err != nil {
		t.Errorf("describe in a full pool: %v", err)
	}
	if i, err := pool.Stat(ctx, other); err != nil || string(i.Description) != "described in a full pool" {
		t.Errorf("%+v, %v", i, err)
	}
	if err := pool.Remove(ctx, other); err != nil {
		t.Errorf("remove in a full pool: %v", err)
	}
}

func published(t *testing.T, pool *Pool, size int64) blockdev.ID {
	t.Helper()
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(pool.Create(t.Context(), id, size), pool.Publish(t.Context(), id, []byte("x"))); err != nil {
		t.Fatal(err)
	}
	return id
}

// TestExtendsItself: a pool that is to be extended gets more data and metadata from
// its group before, or while, writers wait, and nobody is told of an error. When the
// group has none left, it is said once.
func TestExtendsItself(t *testing.T) {
	p := newPlace(t, "24m")
	p.o.Extend = Extend{At: 80, By: 50}
	pool := p.open(t)
	id := published(t, pool, 128<<20)
	e, err := pool.Open(t.Context(), id, anyBlock)
	if err != nil {
		t.Fatal(err)
	}
	w := rawWriter{e.Path}
	const blocks = 36 << 20 / block
	for n := range blocks {
		if err := w.write(n); err != nil {
			t.Fatalf("block %d: %v", n, err)
		}
	}
	for n := range blocks {
		if b, err := w.read(n); err != nil || !bytes.Equal(b, pattern(n)) {
			t.Errorf("block %d: %v", n, err)
		}
	}
	before := health(t, pool)
	if before.Data.Total < 36<<20 {
		t.Errorf("health %+v", before)
	}
	if err := fillMetadata(t, pool, 85); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "more metadata", func() bool { return health(t, pool).Meta.Total > before.Meta.Total })
	if err := pool.Close(t.Context(), id, e.Lease); err != nil {
		t.Error(err)
	}
	for _, bad := range []Extend{{At: 10}, {At: 100}, {At: 80, By: -1}} {
		p.o.Extend = bad
		if _, err := p.tryOpen(t); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func health(t *testing.T, p *Pool) blockdev.Health {
	t.Helper()
	h, err := p.Health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// waitFor waits for what happens in the background, as long as the test may take.
func waitFor(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}

var nextThin = 1 << 20

// fillMetadata makes thin devices, of which LVM knows nothing, until so much of the
// pool's metadata is used, in percent, or the kernel refuses.
func fillMetadata(t *testing.T, p *Pool, percent int64) error {
	t.Helper()
	for {
		s, err := p.status()
		if err != nil {
			t.Fatal(err)
		}
		if s.meta.percent() >= percent {
			return nil
		}
		for range 16 {
			if err := sys.MapperMessage(p.dmName(p.thin)+"-tpool", fmt.Sprintf("create_thin %d", nextThin)); err != nil {
				return err
			}
			nextThin++
		}
	}
}

// TestFullMetadata: metadata to the brim. What was acknowledged is there, the pool
// says that it needs repair, refuses changes with that, and the way that it names
// leads out.
func TestFullMetadata(t *testing.T) {
	p := newPlace(t, "64m --poolmetadatasize 2m")
	pool := p.open(t)
	other := published(t, pool, 1<<20)
	id := published(t, pool, 48<<20)
	e, err := pool.Open(t.Context(), id, anyBlock)
	if err != nil {
		t.Fatal(err)
	}
	w := rawWriter{e.Path}
	for n := range 16 {
		if err := w.write(n); err != nil {
			t.Fatal(err)
		}
	}
	before, err := pool.Capacity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := fillMetadata(t, pool, 90); err != nil {
		t.Fatal(err)
	}
	if h := health(t, pool); h.State != blockdev.PoolLow || !strings.Contains(h.Reason, "--poolmetadatasize") {
		t.Errorf("health with little metadata left: %+v", h)
	}
	acknowledged := 16
	if err := fillMetadata(t, pool, 101); err == nil {
		t.Error("the metadata does not fill")
	}
	for ; acknowledged < 180; acknowledged++ {
		if err := w.write(acknowledged); err != nil {
			t.Logf("block %d: %v", acknowledged, err)
			break
		}
	}
	if after, err := pool.Capacity(t.Context()); err == nil && after.Free >= before.Free {
		t.Errorf("free went from %d to %d", before.Free, after.Free)
	}
	h := health(t, pool)
	t.Logf("health %+v", h)
	if h.State == blockdev.PoolNeedsRepair {
		for what, err := range map[string]error{
			"create": pool.Create(t.Context(), blockdevtest.NewID(blockdev.PrefixVolume), 1<<20), "describe": pool.Describe(t.Context(), other, []byte("y")),
			"publish": pool.Publish(t.Context(), other, []byte("y")),
		} {
			if !errors.Is(err, blockdev.ErrNeedsRepair) || !strings.Contains(err.Error(), "--poolmetadatasize") {
				t.Errorf("%s in a pool that needs repair: %v", what, err)
			}
		}
	} else {
		t.Errorf("health with full metadata: %+v", h)
	}
	// As the reason says.
	pool.Shutdown()
	p.pool = nil
	thin := strings.TrimPrefix(p.name, "vg/")
	sh(t, "lvs --noheadings -o lv_name -S 'pool_lv="+thin+" && lv_active=active' vg | while read v; do lvchange -qq -an vg/$v; done; lvchange -qq -an "+p.name)
	sh(t, "lvextend -qq -y --poolmetadatasize +4m "+p.name+"; lvchange -qq -ay "+p.name)
	pool = p.open(t)
	if h := health(t, pool); h.State != blockdev.PoolHealthy {
		t.Errorf("health after the repair: %+v", h)
	}
	if e, err = pool.Open(t.Context(), id, anyBlock); err != nil {
		t.Fatal(err)
	}
	for n := range acknowledged {
		if b, err := w.read(n); err != nil || !bytes.Equal(b, pattern(n)) {
			t.Errorf("block %d of %d, acknowledged, is lost: %v", n, acknowledged, err)
		}
	}
	if err := errors.Join(w.write(acknowledged), pool.Close(t.Context(), id, e.Lease), pool.Describe(t.Context(), other, []byte("y")), pool.Remove(t.Context(), other)); err != nil {
		t.Error(err)
	}
}

// TestStaleBytes: what was in a volume that was removed, or discarded, is never in
// another one, in whatever way its blocks are got.
func TestStaleBytes(t *testing.T) {
	p := newPlace(t, "40m")
	pool := p.open(t)
	const size = 20 << 20
	secret := bytes.Repeat([]byte("a secret of the tenant before..."), 1<<20/32)
	spoil := func(id blockdev.ID) {
		withImage(t, pool, id, func(f *os.File) {
			for at := int64(0); at < size; at += 1 << 20 {
				if _, err := f.WriteAt(secret, at); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	// touch writes a sector in each chunk: the rest of the chunk is what was there, or zeroes.
	touch := func(id blockdev.ID, size int64) {
		withImage(t, pool, id, func(f *os.File) {
			for at := int64(0); at < size; at += pool.chunk {
				if _, err := f.WriteAt(bytes.Repeat([]byte{'x'}, sector), at+4096); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			sh(t, "blockdev --flushbufs "+f.Name())
			b := make([]byte, 1<<20)
			for at := int64(0); at < size; at += int64(len(b)) {
				if _, err := io.ReadFull(io.NewSectionReader(f, at, int64(len(b))), b); err != nil {
					t.Fatal(err)
				}
				if n := bytes.Index(b, []byte("secret")); n >= 0 {
					t.Fatalf("%s shows at %d what another had: %.40q", id, at+int64(n), b[n:])
				}
			}
		})
	}
	gone := func(id blockdev.ID) {
		if err := pool.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "reclaimed space", func() bool { n, err := pool.Reclaiming(t.Context()); return err == nil && n == 0 })
	}
	first := published(t, pool, size)
	spoil(first)
	gone(first)
	second := published(t, pool, size/2)
	touch(second, size/2)
	if err := pool.Grow(t.Context(), second, size); err != nil {
		t.Fatal(err)
	}
	touch(second, size)
	gone(second)
	// A clone that discards what it shares, and writes there, shows nothing of its source.
	source, clone := published(t, pool, size), blockdevtest.NewID(blockdev.PrefixVolume)
	spoil(source)
	if err := errors.Join(pool.Clone(t.Context(), clone, source, size), pool.Publish(t.Context(), clone, nil)); err != nil {
		t.Fatal(err)
	}
	withImage(t, pool, clone, func(f *os.File) { sh(t, "blkdiscard "+f.Name()) })
	gone(source)
	touch(clone, size)
	// What is discarded is given back to the pool.
	before := health(t, pool).Data.Used
	withImage(t, pool, clone, func(f *os.File) { sh(t, "blkdiscard "+f.Name()) })
	if after := health(t, pool).Data.Used; before-after < size {
		t.Errorf("a discard of %d bytes gave %d back", size, before-after)
	}
}

// withImage opens an image for a moment.
func withImage(t *testing.T, pool *Pool, id blockdev.ID, fn func(f *os.File)) {
	t.Helper()
	e, err := pool.Open(t.Context(), id, anyBlock)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(e.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	fn(f)
	if err := errors.Join(f.Sync(), f.Close(), pool.Close(t.Context(), id, e.Lease)); err != nil {
		t.Fatal(err)
	}
}

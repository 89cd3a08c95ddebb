package sparse

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

const (
	modelBlock = 4096
	modelSize  = 64 * modelBlock
)

// model is what a pool's images are to read as: blocks by number, those of zeroes
// absent.
type model struct {
	t       *testing.T
	kept    *keptPool
	pool    *Pool
	setup   func(*Pool)
	workers Workers   // nil: none
	store   *farStore // of the base of what is created; nil: there is none
	images  map[blockdev.ID]*modelImage
}

type modelImage struct {
	size   int64
	blocks map[int64]byte
}

func (i *modelImage) clone(size int64) *modelImage {
	return &modelImage{size, maps.Clone(i.blocks)}
}

func newModel(t *testing.T, dir string, setup func(*Pool)) *model {
	m := &model{t: t, kept: keep(t, dir), setup: setup, images: map[blockdev.ID]*modelImage{}}
	m.reopen()
	return m
}

func (m *model) reopen() {
	m.kept.close()
	p, err := Open(m.t.Context(), m.kept.dir, Options{Host: "test", Rate: -1, Workers: m.workers})
	if err != nil {
		m.t.Fatal(err)
	}
	m.kept.pool, m.pool = p, p
	m.setup(m.pool)
}

// create makes and publishes a blank image.
func (m *model) create(id blockdev.ID) error {
	if m.images[id] != nil {
		return nil
	}
	if err := m.unlessThere(id, func() error { return m.pool.Create(m.t.Context(), id, modelSize) }); err != nil {
		return err
	}
	m.images[id] = &modelImage{modelSize, map[int64]byte{}}
	return nil
}

// write fills blocks with a byte; durable on return. Until it has succeeded each of
// the blocks may be either.
func (m *model) write(id blockdev.ID, fill byte, blocks ...int64) error {
	b, err := m.pool.Access(m.t.Context(), id, false)
	if err != nil {
		return err
	}
	for _, n := range blocks {
		if _, err := b.WriteAt(bytes.Repeat([]byte{fill}, modelBlock), n*modelBlock); err != nil {
			return errors.Join(err, b.Close())
		}
	}
	if err := errors.Join(b.Sync(), b.Close()); err != nil {
		return err
	}
	for _, n := range blocks {
		m.images[id].blocks[n] = fill
	}
	return nil
}

func (m *model) snapshot(snap, of blockdev.ID) error {
	if m.images[snap] != nil {
		return nil
	}
	if err := m.unlessThere(snap, func() error { _, err := m.pool.Snapshot(m.t.Context(), snap, of); return err }); err != nil {
		return err
	}
	m.images[snap] = m.images[of].clone(m.images[of].size)
	return nil
}

func (m *model) fork(id, from blockdev.ID, size int64) error {
	if m.images[id] != nil {
		return nil
	}
	if err := m.unlessThere(id, func() error { return m.pool.Clone(m.t.Context(), id, from, size) }); err != nil {
		return err
	}
	m.images[id] = m.images[from].clone(size)
	return nil
}

// unlessThere makes and publishes an image, unless it was published before a crash.
func (m *model) unlessThere(id blockdev.ID, draft func() error) error {
	info, err := m.pool.Stat(m.t.Context(), id)
	if err != nil || info.Draft {
		if err := draft(); err != nil {
			return err
		}
	}
	return m.pool.Publish(m.t.Context(), id, []byte(id))
}

func (m *model) grow(id blockdev.ID, size int64) error {
	err := m.pool.Grow(m.t.Context(), id, size)
	if err == nil {
		m.images[id].size = max(m.images[id].size, size)
	}
	return err
}

func (m *model) remove(id blockdev.ID) error {
	err := m.pool.Remove(m.t.Context(), id)
	if err == nil {
		delete(m.images, id)
	}
	return err
}

// check compares all that the pool has with the model. grown may have been grown, or
// not, by a call that was cut; gone may be gone.
func (m *model) check(when string, grown, gone blockdev.ID) {
	m.t.Helper()
	ctx := m.t.Context()
	infos, err := m.pool.List(ctx)
	if err != nil {
		m.t.Fatalf("%s: %v", when, err)
	}
	listed := map[blockdev.ID]blockdev.Info{}
	for _, info := range infos {
		listed[info.ID] = info
	}
	for id, want := range m.images {
		info, ok := listed[id]
		if !ok && id == gone {
			continue
		}
		if !ok || info.Draft || string(info.Description) != string(id) || info.Size != want.size && id != grown || info.Shared > info.Allocated {
			m.t.Fatalf("%s: %s is listed as %v %+v, want %d bytes", when, id, ok, info, want.size)
		}
		m.compare(when, id, want)
	}
	if found, err := m.pool.Quarantined(ctx); err != nil || len(found) != 0 {
		m.t.Fatalf("%s: quarantined %+v, %v", when, found, err)
	}
}

func (m *model) compare(when string, id blockdev.ID, want *modelImage) {
	m.t.Helper()
	b, err := m.pool.Access(m.t.Context(), id, true)
	if err != nil {
		m.t.Fatalf("%s: %s: %v", when, id, err)
	}
	got := make([]byte, b.Size())
	if _, err := b.ReadAt(got, 0); err != nil {
		m.t.Fatalf("%s: %s: %v", when, id, err)
	}
	if err := b.Close(); err != nil {
		m.t.Fatal(err)
	}
	for n := range b.Size() / modelBlock {
		if !bytes.Equal(got[n*modelBlock:(n+1)*modelBlock], bytes.Repeat([]byte{want.blocks[n]}, modelBlock)) {
			m.t.Fatalf("%s: %s: block %d begins with %d, want %d", when, id, n, got[n*modelBlock], want.blocks[n])
		}
	}
}

// tidy fails when an image has files that nothing names.
func (m *model) tidy(when string) {
	m.t.Helper()
	for id := range m.images {
		dir := m.pool.image(id)
		c, err := readChain(id, dir)
		if err != nil {
			m.t.Fatal(err)
		}
		want := []string{descriptionFile, lockFile, traceFile} // of who reads before hydration is through
		if c == nil {
			want = append(want, imageFile)
		} else {
			want = append(append(want, chainFile), c.files()...)
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			m.t.Fatal(err)
		}
		for _, entry := range entries {
			if !slices.Contains(want, entry.Name()) {
				m.t.Errorf("%s: %s has %s, which nothing names", when, id, entry.Name())
			}
		}
	}
	for _, dir := range []string{draftsDir, quarantineDir} {
		if entries, err := os.ReadDir(m.pool.path(dir)); err != nil || len(entries) != 0 {
			m.t.Errorf("%s: %s has %v, %v", when, dir, entries, err)
		}
	}
}

// cheapFlushes puts a test's filesystems into memory where there is a place: what it
// is about is the order of calls, not the power.
func cheapFlushes(t *testing.T) {
	t.Helper()
	const memory = "/dev/shm"
	if info, err := os.Stat(memory); err == nil && info.IsDir() {
		t.Setenv("TMPDIR", memory)
	}
}

// layeredPlaces are filesystems on which images are layered: one that has no reflink, and
// one whose reflink is used, or not.
func layeredPlaces(t *testing.T) map[string]func(*Pool) {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.ReflinkPool, blockdevtest.Ext4)
	return map[string]func(*Pool){
		blockdevtest.Ext4Dir(t):    func(p *Pool) { p.layers = true },
		blockdevtest.ReflinkDir(t): func(p *Pool) { p.layers = true },
	}
}

// TestLayeredStory cuts the life of layered images at every point between two side
// effects, once by a crash and once by an error, and repeats the step that was cut:
// at each moment all that was acknowledged is there, and in the end nothing is left.
func TestLayeredStory(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	places := layeredPlaces(t)
	points := map[string]bool{}
	for base, setup := range places {
		for _, crash := range []bool{true, false} {
			for cut := 0; ; cut++ {
				point := cutStory(t, filepath.Join(base, fmt.Sprintf("%d-%v", cut, crash)), setup, cut, crash, layeredStory)
				if point == "" {
					break
				}
				points[point] = true
			}
		}
	}
	for _, point := range []string{"seal.layer", "seal.base", "seal.record", "seal.unlink", "draft.links", "draft.chain",
		"flatten.absorb", "flatten.hydrate", "flat.link", "flat.flush", "flat.unchain", "flat.sweep", "grow.flush", "publish.rename"} {
		if !points[point] {
			t.Errorf("no story was cut at %s", point)
		}
	}
}

// storyStep is one of a story; of is the image that a cut leaves grown or gone, or not.
type storyStep struct {
	of blockdev.ID
	do func() error
}

// cutStory lives one, and cuts it at the n-th point.
func cutStory(t *testing.T, dir string, setup func(*Pool), cut int, crash bool, steps func(m *model) []storyStep) (cutAt string) {
	t.Helper()
	passed := 0
	m := newModel(t, dir, func(p *Pool) {
		setup(p)
		p.crash = func(point string) error {
			if passed++; passed == cut+1 {
				cutAt = point
				return errCut
			}
			return nil
		}
	})
	for i, step := range steps(m) {
		err := step.do()
		if errors.Is(err, errCut) {
			if crash {
				m.reopen()
			}
			m.check(fmt.Sprintf("cut %d at %s in step %d", cut, cutAt, i), step.of, step.of)
			err = step.do()
		}
		if err != nil {
			t.Fatalf("cut %d (crash %v) at %s: step %d: %v", cut, crash, cutAt, i, err)
		}
	}
	m.reopen()
	m.check(fmt.Sprintf("cut %d at %s, at the end", cut, cutAt), "", "")
	m.tidy(fmt.Sprintf("cut %d at %s", cut, cutAt))
	m.kept.close()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	return cutAt
}

func layeredStory(m *model) []storyStep {
	ids := map[string]blockdev.ID{}
	for _, name := range []string{"src.1", "vol.1", "snp.1", "snp.2", "vol.2", "snp.3", "vol.3", "snp.4"} {
		ids[name] = blockdevtest.NewID(name[:3])
	}
	src, vol, fork, third := ids["src.1"], ids["vol.1"], ids["vol.2"], ids["vol.3"]
	flatten := func(id blockdev.ID) error { return m.pool.Flatten(m.t.Context(), id) }
	return []storyStep{
		{src, func() error { return m.create(src) }},
		{"", func() error { return m.writeOnce(src, 1, 0, 1, 2, 3, 60) }},
		{vol, func() error { return m.fork(vol, src, modelSize) }},
		{"", func() error { return m.write(vol, 2, 1, 10) }},
		{"", func() error { return m.snapshot(ids["snp.1"], vol) }},
		{"", func() error { return m.write(vol, 3, 2, 11) }},
		{"", func() error { return m.snapshot(ids["snp.2"], vol) }},
		{"", func() error { return m.fork(fork, ids["snp.1"], modelSize+4*modelBlock) }},
		{"", func() error { return m.write(fork, 4, 3, 12, 66) }},
		{vol, func() error { return m.grow(vol, modelSize+2*modelBlock) }},
		{ids["snp.1"], func() error { return m.remove(ids["snp.1"]) }},
		{"", func() error { return flatten(vol) }},
		{"", func() error { return m.write(vol, 5, 65) }},
		{"", func() error { return m.snapshot(ids["snp.3"], vol) }},
		{src, func() error { return m.remove(src) }},
		{"", func() error { return m.fork(third, ids["snp.3"], modelSize+2*modelBlock) }},
		{"", func() error { return m.snapshot(ids["snp.4"], third) }}, // of a top without a write
		{"", func() error { return flatten(fork) }},
		{ids["snp.3"], func() error { return m.remove(ids["snp.3"]) }},
		{"", func() error { return flatten(third) }},
	}
}

// writeOnce is write of an image that takes writes only as long as nobody reads from
// it: not again after a crash.
func (m *model) writeOnce(id blockdev.ID, fill byte, blocks ...int64) error {
	if len(m.images[id].blocks) > 0 {
		return nil
	}
	return m.write(id, fill, blocks...)
}

// TestLayeredModel does what comes to mind to layered images, with crashes and errors
// in between, and compares them with a model all the time.
func TestLayeredModel(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	places := layeredPlaces(t)
	content, _ := farBytes()
	store := newFarStore(t, content)
	for base, setup := range places {
		for seed := range uint64(3) {
			r := rand.New(rand.NewPCG(seed, 7))
			cutAt := -1
			m := newModel(t, filepath.Join(base, fmt.Sprint(seed)), func(p *Pool) {
				setup(p)
				p.reflinks = p.reflinks && seed > 0
				p.crash = func(string) error {
					if cutAt--; cutAt == 0 {
						return errCut
					}
					return nil
				}
			})
			if seed == 2 {
				m.store = store
			}
			for step := range 100 {
				cutAt = -1
				if r.IntN(3) == 0 {
					cutAt = 1 + r.IntN(12)
				}
				what, id, err := m.randomStep(r)
				if errors.Is(err, errCut) {
					if r.IntN(2) == 0 {
						m.reopen()
					}
					m.removeUnknown()
				} else if err != nil {
					t.Fatalf("seed %d: step %d: %s: %v", seed, step, what, err)
				}
				cutAt = -1
				m.adopt(id)
				m.check(fmt.Sprintf("seed %d: step %d: %s", seed, step, what), "", "")
			}
			m.reopen()
			m.tidy(fmt.Sprintf("seed %d", seed))
		}
	}
}

// randomStep tells also which image may be otherwise than the model says if it fails.
func (m *model) randomStep(r *rand.Rand) (what string, id blockdev.ID, err error) {
	vols, snaps := m.having(blockdev.PrefixVolume), m.having(blockdev.PrefixSnapshot)
	if len(vols) == 0 {
		id := blockdevtest.NewID(blockdev.PrefixVolume)
		if m.store != nil {
			return "create of a base far away", "", m.far(id, m.store)
		}
		return "create", "", m.create(id)
	}
	vol := vols[r.IntN(len(vols))]
	switch n := r.IntN(12); {
	case n < 5:
		var blocks []int64
		for range 1 + r.IntN(4) {
			blocks = append(blocks, r.Int64N(m.images[vol].size/modelBlock))
		}
		return "write", "", m.write(vol, byte(1+r.IntN(250)), blocks...)
	case n < 7 && len(snaps) < 6:
		return "snapshot", "", m.snapshot(blockdevtest.NewID(blockdev.PrefixSnapshot), vol)
	case n < 8 && len(snaps) > 0 && len(vols) < 5:
		from := snaps[r.IntN(len(snaps))]
		return "fork", "", m.fork(blockdevtest.NewID(blockdev.PrefixVolume), from, m.images[from].size+r.Int64N(3)*modelBlock)
	case n < 9:
		return "flatten", "", m.pool.Flatten(m.t.Context(), vol)
	case n < 10:
		return "grow", vol, m.grow(vol, m.images[vol].size+modelBlock)
	case n < 11 && len(snaps) > 0:
		gone := snaps[r.IntN(len(snaps))]
		return "remove a snapshot", gone, m.remove(gone)
	case len(vols) > 2:
		return "remove a volume", vol, m.remove(vol)
	}
	m.reopen()
	return "reopen", "", nil
}

func (m *model) having(prefix string) (ids []blockdev.ID) {
	for id := range m.images {
		if strings.HasPrefix(string(id), prefix+"-") {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// adopt takes what a Grow or Remove that was cut has done.
func (m *model) adopt(id blockdev.ID) {
	if id == "" || m.images[id] == nil {
		return
	}
	info, err := m.pool.Stat(m.t.Context(), id)
	if errors.Is(err, blockdev.ErrNotFound) {
		delete(m.images, id)
		return
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.images[id].size = info.Size
}

// removeUnknown takes away what a cut call may have made, as the engine does with
// what no record names.
func (m *model) removeUnknown() {
	infos, err := m.pool.List(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	for _, info := range infos {
		if m.images[info.ID] == nil {
			if err := m.pool.Remove(m.t.Context(), info.ID); err != nil {
				m.t.Fatal(err)
			}
		}
	}
}

// TestDamagedChain: an image whose chain is not whole is quarantined, and never reads
// as something else.
func TestDamagedChain(t *testing.T) {
	cheapFlushes(t)
	for what, spoil := range map[string]func(dir string, c *chain) error{
		"a layer is missing":   func(dir string, c *chain) error { return os.Remove(dir + "/" + c.Layers[0] + dataSuffix) },
		"a map is missing":     func(dir string, c *chain) error { return os.Remove(dir + "/" + c.Layers[0] + mapSuffix) },
		"the base is missing":  func(dir string, c *chain) error { return os.Remove(dir + "/" + c.Base) },
		"a layer is too short": func(dir string, c *chain) error { return os.Truncate(dir+"/"+c.Layers[0]+dataSuffix, modelBlock) },
		"a map has no header":  func(dir string, c *chain) error { return os.Truncate(dir+"/"+c.Layers[0]+mapSuffix, 0) },
		"the base is too short": func(dir string, c *chain) error {
			whole, err := os.ReadFile(dir + "/" + c.Base)
			if err == nil { // of its own: the source is another image's
				err = errors.Join(os.Remove(dir+"/"+c.Base), os.WriteFile(dir+"/"+c.Base, whole[:modelBlock], 0o600))
			}
			return err
		},
		"the chain is another's": func(dir string, _ *chain) error {
			return errors.Join(os.WriteFile(dir+"/"+chainFile, []byte("{}\n\n"), 0o600))
		},
	} {
		t.Run(what, func(t *testing.T) {
			m := newModel(t, filepath.Join(t.TempDir(), "pool"), func(p *Pool) { p.layers, p.reflinks = true, false })
			src, vol := blockdevtest.NewID(blockdev.PrefixSource), blockdevtest.NewID(blockdev.PrefixVolume)
			if err := errors.Join(m.create(src), m.write(src, 1, 0, 1), m.fork(vol, src, modelSize), m.write(vol, 2, 1)); err != nil {
				t.Fatal(err)
			}
			c, err := readChain(vol, m.pool.image(vol))
			if err != nil || c == nil {
				t.Fatalf("%+v, %v", c, err)
			}
			if err := spoil(m.pool.image(vol), c); err != nil {
				t.Fatal(err)
			}
			if _, err := m.pool.Stat(t.Context(), vol); !errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("stat: %v", err)
			}
			if b, err := m.pool.Access(t.Context(), vol, true); err == nil {
				t.Errorf("it can be read")
				b.Close()
			}
			if err := m.pool.Flatten(t.Context(), vol); err == nil {
				t.Error("it was made flat")
			}
			if infos, err := m.pool.List(t.Context()); err != nil || len(infos) != 1 || infos[0].ID != src {
				t.Errorf("listed %+v, %v", infos, err)
			}
			if found, err := m.pool.Quarantined(t.Context()); err != nil || len(found) != 1 {
				t.Errorf("quarantined %+v, %v", found, err)
			}
		})
	}
}

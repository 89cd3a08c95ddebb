package lvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

var errCut = errors.New("this is where the test cuts")

// knife is a fault that strikes once, at the n-th effect of those that count.
type knife struct {
	counts func(name string) bool // nil: what changes something, but not in the background
	at     int                    // 0: never
	after  bool                   // the effect is done, and then it strikes
	dies   bool                   // nothing is done from then on, as after a crash
	passed int
	struck string // where
}

func isQuestion(name string) bool { return strings.HasPrefix(name, "ask ") }

func (k *knife) counted(name string) bool {
	if k.counts != nil {
		return k.counts(name)
	}
	return !isQuestion(name) && name != "reclaim"
}

// hand holds a knife, or none, around a pool.
type hand struct {
	mu sync.Mutex
	k  *knife
}

func (h *hand) take(k *knife) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.k = k
}

func (h *hand) fault(name string, do func() error) error {
	h.mu.Lock()
	k := h.k
	dead := k != nil && k.dies && k.struck != ""
	now := false
	if k != nil && !dead && k.counted(name) {
		k.passed++
		if now = k.passed == k.at; now {
			k.struck = name
		}
	}
	h.mu.Unlock()
	if dead || now && !k.after {
		return errCut
	}
	err := do()
	if now && err == nil {
		return errCut
	}
	if now { // it had an end of its own, which may be a good one
		h.mu.Lock()
		k.struck = ""
		h.mu.Unlock()
	}
	return err
}

// points says which of a test's points are tried in this run: under emulation all
// of them take many minutes. Each is tried every so many days, or all of them with
// HOLDFAST_LVM_POINTS=all; with a number there it is as on that day.
func points(t *testing.T, days int) func(n int) bool {
	if os.Getenv("HOLDFAST_LVM_POINTS") == "all" {
		return func(int) bool { return true }
	}
	day := today(t)
	return func(n int) bool { return (n+day)%days == 0 }
}

func today(t *testing.T) int {
	day, err := strconv.Atoi(os.Getenv("HOLDFAST_LVM_POINTS"))
	if err != nil {
		day = time.Now().YearDay()
	}
	t.Logf("HOLDFAST_LVM_POINTS=%d", day)
	return day
}

// scene is where the steps of the crash test happen.
type scene struct {
	*testing.T
	place *place
	hand  *hand
	pool  *Pool
	src   blockdev.ID // an image of 2 MiB with a text at its start
	id    blockdev.ID // of the step
	e     blockdev.Endpoint
}

func (s *scene) ok(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *scene) ctx() context.Context { return s.T.Context() }

var anyBlock = blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}}

// image makes the step's image, as before the step.
func (s *scene) image() {
	s.ok(s.pool.Create(s.ctx(), s.id, 1<<20))
	s.ok(s.pool.Publish(s.ctx(), s.id, []byte("1")))
}

func (s *scene) opened() {
	s.image()
	s.ok(s.open(anyBlock))
}

func (s *scene) open(w blockdev.Want) (err error) {
	s.e, err = s.pool.Open(s.ctx(), s.id, w)
	return err
}

// is fails unless the step's image is like this.
func (s *scene) is(draft bool, size int64, description string, open bool) {
	s.Helper()
	i, err := s.pool.Stat(s.ctx(), s.id)
	if err != nil || i.Draft != draft || i.Size != size || string(i.Description) != description || i.Open != open {
		s.Errorf("%+v, %v; want draft=%t, %d bytes, %q, open=%t", i, err, draft, size, description, open)
	}
}

func (s *scene) gone() {
	s.Helper()
	if i, err := s.pool.Stat(s.ctx(), s.id); !errors.Is(err, blockdev.ErrNotFound) {
		s.Errorf("it is still there: %+v, %v", i, err)
	}
}

// step is one call of the backend: what is before it, itself, and what is so when
// it has succeeded.
type step struct {
	name   string
	before func(*scene)
	do     func(*scene) error
	after  func(*scene)
}

var steps = []step{
	{"create", func(*scene) {}, func(s *scene) error { return s.pool.Create(s.ctx(), s.id, 1<<20) }, func(s *scene) { s.is(true, 1<<20, "", false) }},
	{"create over a draft that is open", func(s *scene) {
		s.ok(s.pool.Create(s.ctx(), s.id, 3<<20))
		s.ok(s.open(anyBlock))
		s.pool = s.place.open(s.T)
	}, func(s *scene) error { return s.pool.Create(s.ctx(), s.id, 1<<20) }, func(s *scene) { s.is(true, 1<<20, "", false) }},
	{"publish", func(s *scene) {
		s.ok(s.pool.Create(s.ctx(), s.id, 1<<20))
		s.ok(s.open(anyBlock))
	}, func(s *scene) error { return s.pool.Publish(s.ctx(), s.id, []byte("1")) }, func(s *scene) { s.is(false, 1<<20, "1", true) }},
	{"create after a publish that failed", func(s *scene) {
		s.ok(s.pool.Create(s.ctx(), s.id, 3<<20))
		s.hand.take(&knife{at: 2}) // the description is written
		if err := s.pool.Publish(s.ctx(), s.id, []byte("1")); !errors.Is(err, errCut) {
			s.Fatal(err)
		}
		s.hand.take(nil)
	}, func(s *scene) error { return s.pool.Create(s.ctx(), s.id, 1<<20) }, func(s *scene) { s.is(true, 1<<20, "", false) }},
	{"describe", (*scene).image, func(s *scene) error { return s.pool.Describe(s.ctx(), s.id, []byte("2")) }, func(s *scene) { s.is(false, 1<<20, "2", false) }},
	{"clone grown", func(*scene) {}, func(s *scene) error { return s.pool.Clone(s.ctx(), s.id, s.src, 5<<20) }, func(s *scene) {
		s.is(true, 5<<20, "", false)
		s.ok(s.open(anyBlock))
		b := make([]byte, 6)
		f, err := os.Open(s.e.Path)
		s.ok(err)
		_, err = f.Read(b)
		s.ok(errors.Join(err, f.Close(), s.pool.Close(s.ctx(), s.id, s.e.Lease)))
		if string(b) != "source" {
			s.Errorf("the clone holds %q", b)
		}
	}},
	{"open", (*scene).image, func(s *scene) error { return s.open(anyBlock) }, func(s *scene) { s.is(false, 1<<20, "1", true) }},
	{"open read-only", (*scene).image, func(s *scene) error {
		err := s.open(blockdev.Want{Kinds: anyBlock.Kinds, ReadOnly: true})
		if errors.Is(err, blockdev.ErrBusy) { // a crash left it open, and nobody has its lease
			s.ok(s.open(anyBlock))
			s.ok(s.pool.Close(s.ctx(), s.id, s.e.Lease))
			err = s.open(blockdev.Want{Kinds: anyBlock.Kinds, ReadOnly: true})
		}
		return err
	}, func(s *scene) {
		if !s.e.ReadOnly {
			s.Errorf("opened as %+v", s.e)
		}
	}},
	{"grow read-only", func(s *scene) {
		s.image()
		s.ok(s.open(blockdev.Want{Kinds: anyBlock.Kinds, ReadOnly: true}))
	}, func(s *scene) error { return s.pool.Grow(s.ctx(), s.id, 3<<20) }, func(s *scene) {
		s.is(false, 3<<20, "1", true)
		if is, err := s.pool.readOnly(imagePrefix + string(s.id)); err != nil || !is {
			s.Errorf("after a growth it is read-only: %t, %v", is, err)
		}
	}},
	{"close", (*scene).opened, func(s *scene) error { return s.pool.Close(s.ctx(), s.id, s.e.Lease) }, func(s *scene) { s.is(false, 1<<20, "1", false) }},
	{"remove", (*scene).image, func(s *scene) error { return s.pool.Remove(s.ctx(), s.id) }, (*scene).gone},
	{"remove a draft", func(s *scene) { s.ok(s.pool.Create(s.ctx(), s.id, 1<<20)) }, func(s *scene) error { return s.pool.Remove(s.ctx(), s.id) }, (*scene).gone},
	{"quarantine", func(s *scene) {
		s.image()
		damage(s.T, s.pool, s.id)
	}, func(s *scene) error { _, err := s.pool.List(s.ctx()); return err }, func(s *scene) {
		s.gone()
		found, err := s.pool.Quarantined(s.ctx())
		if n := slices.IndexFunc(found, func(q blockdev.Quarantine) bool { return strings.Contains(q.Name, string(s.id)) }); err != nil || n < 0 || found[n].Reason == "" {
			s.Errorf("quarantined %+v, %v", found, err)
		}
	}},
}

// TestEveryPoint strikes at every side effect of every call of the backend, before
// it and after it: once as a crash, after which the pool is opened anew, and once as
// an error that the process survives. The call tells of it, and made again it
// succeeds; nothing else has changed and nothing is left.
func TestEveryPoint(t *testing.T) {
	s := &scene{T: t, place: sharedPlace(t), hand: &hand{}, src: blockdevtest.NewID(blockdev.PrefixSource)}
	tried, n := points(t, 25), 0
	s.place.o.fault = s.hand.fault
	s.pool = s.place.open(t)
	s.id = s.src
	s.ok(s.pool.Create(t.Context(), s.src, 2<<20))
	s.ok(s.open(anyBlock))
	s.ok(os.WriteFile(s.e.Path, []byte("source"), 0))
	s.ok(s.pool.Close(t.Context(), s.src, s.e.Lease))
	s.ok(s.pool.Publish(t.Context(), s.src, nil))
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			outer := s.T
			s.T = t
			defer func() { s.T = outer }()
			last := s.try(step, &knife{})
			for at := 1; at <= last; at++ {
				// A crash after one effect is a crash before the next.
				for _, k := range []*knife{{at: at, dies: true}, {at: at}, {at: at, after: true}, {at: at, dies: true, after: true}} {
					if k.dies && k.after && at < last {
						continue
					}
					if n++; tried(n) {
						s.try(step, k)
					}
				}
			}
		})
	}
	s.pool = s.place.open(t)
	s.left()
}

// try does one step with one strike, and tells how many side effects it had.
func (s *scene) try(step step, k *knife) int {
	s.Helper()
	s.id = blockdevtest.NewID(blockdev.PrefixVolume)
	step.before(s)
	s.hand.take(k)
	err := step.do(s)
	at := fmt.Sprintf("%d, %q, after=%t, dies=%t", k.at, k.struck, k.after, k.dies)
	if k.struck != "" && !errors.Is(err, errCut) || k.struck == "" && err != nil {
		s.Errorf("struck at %s: %v", at, err)
	}
	if k.dies {
		s.pool.Shutdown() // what it still does in the background is nothing
		s.place.pool = nil
	}
	s.hand.take(nil)
	if k.dies {
		s.pool = s.place.open(s.T)
	}
	if k.at > 0 {
		if err := step.do(s); err != nil {
			s.Errorf("struck at %s, and again: %v", at, err)
		}
	}
	if step.after(s); s.Failed() {
		s.Fatalf("struck at %s", at)
	}
	return k.passed
}

// left fails unless all that is ours is an image that is listed, with its
// description, or in quarantine.
func (s *scene) left() {
	s.Helper()
	infos, err := s.pool.List(s.ctx())
	s.ok(err)
	for draft, dir := range map[bool]string{false: describedDir, true: draftsDir} {
		var want []string
		for _, i := range infos {
			if i.Draft == draft {
				want = append(want, string(i.ID))
			}
		}
		names, err := s.pool.meta.list(dir)
		s.ok(err)
		slices.Sort(want)
		if slices.Sort(names); !slices.Equal(want, names) {
			s.Errorf("%s are %v, listed are %v", dir, names, want)
		}
	}
	found, err := s.pool.Quarantined(s.ctx())
	s.ok(err)
	rows, err := s.pool.rows(s.ctx())
	s.ok(err)
	ours := 0
	for _, r := range rows {
		if !strings.HasPrefix(r.Name, trashPrefix) && r.Name != s.pool.metaName() {
			ours++
		}
	}
	if ours != len(infos)+len(found) {
		s.Errorf("%d volumes of ours, %d listed, %d in quarantine", ours, len(infos), len(found))
	}
}

// TestQuestionsThatFail: when LVM or the kernel does not answer, each call says so
// and has done nothing; asked again, it succeeds.
func TestQuestionsThatFail(t *testing.T) {
	s := &scene{T: t, place: sharedPlace(t), hand: &hand{}, id: blockdevtest.NewID(blockdev.PrefixVolume)}
	s.place.o.fault = s.hand.fault
	s.pool = s.place.open(t)
	s.image()
	t.Cleanup(func() { sh(t, "vgchange -qq --deltag asked vg") })
	ctx := t.Context()
	new := blockdevtest.NewID(blockdev.PrefixVolume)
	for n, c := range []struct {
		name string
		do   func() error
	}{
		{"stat", func() error { _, err := s.pool.Stat(ctx, s.id); return err }},
		{"list", func() error { _, err := s.pool.List(ctx); return err }},
		{"quarantined", func() error { _, err := s.pool.Quarantined(ctx); return err }},
		{"capacity", func() error { _, err := s.pool.Capacity(ctx); return err }},
		{"create", func() error { return s.pool.Create(ctx, new, 1<<20) }},
		{"publish", func() error { return s.pool.Publish(ctx, new, nil) }},
		{"describe", func() error { return s.pool.Describe(ctx, s.id, []byte("1")) }},
		{"grow", func() error { return s.pool.Grow(ctx, s.id, 1<<20) }},
		{"open", func() error { return s.open(anyBlock) }},
		{"close", func() error { return s.pool.Close(ctx, s.id, s.e.Lease) }},
		{"remove", func() error { return s.pool.Remove(ctx, new) }},
	} {
		for at := 1; ; at++ {
			if at == 1 { // somebody else changes the group: LVM has to be asked
				sh(t, "vgchange -qq --"+[]string{"addtag", "deltag"}[n%2]+" asked vg")
			}
			k := &knife{at: at, counts: isQuestion}
			s.hand.take(k)
			err := c.do()
			s.hand.take(nil)
			if k.struck == "" {
				if err != nil || at == 1 {
					t.Errorf("%s: %v, after %d questions", c.name, err, at-1)
				}
				break
			}
			if !errors.Is(err, errCut) {
				t.Errorf("%s, not answered at %d, %q: %v", c.name, at, k.struck, err)
			}
		}
	}
	s.is(false, 1<<20, "1", false)
	s.left()
}

// TestReclaimStruck: what is left of a removed image goes with the next removal or at
// the next start.
func TestReclaimStruck(t *testing.T) {
	for _, dies := range []bool{false, true} {
		s := &scene{T: t, place: sharedPlace(t), hand: &hand{}, id: blockdevtest.NewID(blockdev.PrefixVolume)}
		s.place.o.fault = s.hand.fault
		s.pool = s.place.open(t)
		s.image()
		k := &knife{at: 1, dies: dies, counts: func(name string) bool { return name == "reclaim" }}
		s.hand.take(k)
		// Space is reclaimed beside it: what dies there may take the removal along.
		if err := s.pool.Remove(t.Context(), s.id); err != nil && !(dies && errors.Is(err, errCut)) {
			t.Fatal(err)
		}
		waitFor(t, "strike", func() bool { s.hand.mu.Lock(); defer s.hand.mu.Unlock(); return k.struck != "" })
		if n, err := s.pool.Reclaiming(t.Context()); !dies && (n != 1 || err != nil) {
			t.Errorf("reclaiming %d, %v", n, err)
		}
		if dies {
			s.pool.Shutdown()
			s.place.pool = nil
		}
		s.hand.take(nil)
		if dies {
			s.pool = s.place.open(t)
		} else {
			s.id = blockdevtest.NewID(blockdev.PrefixVolume)
			s.image()
			s.ok(s.pool.Remove(t.Context(), s.id))
		}
		waitFor(t, "reclaimed space", func() bool { n, err := s.pool.Reclaiming(t.Context()); return err == nil && n == 0 })
	}
}

// TestMadeOursStruck strikes while a pool is made ours. The next Open makes it, whole
// and once.
func TestMadeOursStruck(t *testing.T) {
	p, h := newPlace(t, "24m"), &hand{}
	p.o.fault = h.fault
	tried, last := points(t, 25), 0
	meta := metaPrefix + strings.TrimPrefix(p.name, "vg/")
	for at := 0; at <= last; at++ {
		for n, k := range []*knife{{at: at, dies: true}, {at: at}, {at: at, after: true}} {
			if at == 0 && n > 0 || at > 0 && !tried(3*at+n) {
				continue
			}
			h.take(k)
			pool, err := p.tryOpen(t)
			h.take(nil)
			if (k.struck != "") != errors.Is(err, errCut) {
				t.Errorf("struck at %d, %q, after=%t, dies=%t: %v", at, k.struck, k.after, k.dies, err)
			}
			last = max(last, k.passed)
			if pool == nil {
				pool = p.open(t)
			}
			s := &scene{T: t, pool: pool, id: blockdevtest.NewID(blockdev.PrefixVolume)}
			s.image()
			s.is(false, 1<<20, "1", false)
			s.left()
			if got := sh(t, "lvs --noheadings -o lv_name -S 'lv_name=~"+metaPrefix+"' vg | grep -c "+meta); got != "1" {
				t.Errorf("struck at %d, %q: %s volumes for descriptions", at, k.struck, got)
			}
			pool.Shutdown()
			p.pool = nil
			sh(t, "lvremove -qq -ff -y --select 'pool_lv="+strings.TrimPrefix(p.name, "vg/")+"' vg")
		}
	}
}

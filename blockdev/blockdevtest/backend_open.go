package blockdevtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
)

func openAgain(s *suite) {
	missing := NewID(blockdev.PrefixVolume)
	_, err := s.b.Open(s.ctx(), missing, blockdev.Want{Kinds: s.place.Kinds})
	s.is(err, blockdev.ErrNotFound, "open nothing")
	id := s.published("text")
	for _, kind := range s.place.Kinds {
		want := blockdev.Want{Kinds: []blockdev.Kind{"unheard-of", kind}}
		e, err := s.b.Open(s.ctx(), id, want)
		s.ok(err)
		if e.Kind != kind || e.Size != mib || e.ReadOnly || e.Path == "" || e.Lease == "" {
			s.Errorf("endpoint %+v", e)
		}
		again, err := s.b.Open(s.ctx(), id, want)
		if err != nil || again != e {
			s.Errorf("open again: %+v, %v; want %+v", again, err, e)
		}
		if !s.stat(id).Open {
			s.Error("an open image is not shown as open")
		}
		s.ok(s.b.Close(s.ctx(), id, e.Lease))
		s.ok(s.b.Close(s.ctx(), id, e.Lease))
		if s.stat(id).Open {
			s.Error("a closed image is shown as open")
		}
	}
}

func openOtherwise(s *suite) {
	id := s.published("text")
	for _, kind := range s.place.Kinds {
		e, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{kind}})
		s.ok(err)
		_, err = s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{kind}, ReadOnly: true})
		s.is(err, blockdev.ErrBusy, "read-only beside writable")
		for _, other := range s.place.Kinds {
			if other != kind {
				_, err = s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{other}})
				s.is(err, blockdev.ErrBusy, "another kind")
				again, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{other, kind}})
				if err != nil || again != e {
					s.Errorf("either kind: %+v, %v; want the opening that is there, %+v", again, err, e)
				}
			}
		}
		s.close(id, e)
	}
	e := s.open(id, true)
	_, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: s.place.Kinds})
	s.is(err, blockdev.ErrBusy, "writable beside read-only")
	s.close(id, e)
}

// limitsOfWorker: they are those of the Open that started it until Throttle says
// otherwise, and end with the opening.
func limitsOfWorker(s *suite) {
	throttler, throttles := s.b.(serve.Throttler)
	if !throttles || !slices.Contains(s.place.Kinds, blockdev.NBD) {
		return
	}
	first, second := blockdev.Limits{ReadIOPS: 1000, WriteBytes: 1 << 20}, blockdev.Limits{WriteIOPS: 500}
	for _, readOnly := range []bool{false, true} {
		id := s.published("limited")
		open := func(begin, have blockdev.Limits) blockdev.Endpoint {
			s.Helper()
			e, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}, ReadOnly: readOnly, Limits: begin})
			s.ok(err)
			service, err := s.b.(serve.Observer).Observe(s.ctx(), id)
			s.ok(err)
			if service.Limits != have {
				s.Errorf("opened with %+v, read-only %t: %+v hold, want %+v", begin, readOnly, service.Limits, have)
			}
			return e
		}
		open(first, first)
		open(second, first)
		open(blockdev.Limits{}, first)
		s.ok(throttler.Throttle(s.ctx(), id, second))
		e := open(first, second)
		s.restart()
		throttler = s.b.(serve.Throttler) //nolint:forcetypeassert // it was one
		open(first, second)
		s.close(id, e)
		e = open(blockdev.Limits{}, blockdev.Limits{})
		s.close(id, e)
	}
}

func staleLease(s *suite) {
	id := s.published("text")
	e := s.open(id, false)
	s.ok(s.b.Close(s.ctx(), id, "made up"))
	s.ok(s.b.Close(s.ctx(), id, ""))
	s.ok(s.b.Close(s.ctx(), NewID(blockdev.PrefixVolume), e.Lease))
	if !s.stat(id).Open {
		s.Fatal("a lease that is not the image's closed it")
	}
	if !slices.Contains(s.place.Kinds, blockdev.Block) {
		s.close(id, e)
		return
	}
	s.close(id, e)
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}}
	first, err := s.b.Open(s.ctx(), id, want)
	s.ok(err)
	s.close(id, first)
	second, err := s.b.Open(s.ctx(), id, want)
	s.ok(err)
	s.ok(s.b.Close(s.ctx(), id, first.Lease))
	if !s.stat(id).Open {
		s.Error("the lease of an earlier opening closed a later one")
	}
	s.close(id, second)
}

func readOnly(s *suite) {
	if !slices.Contains(s.place.Kinds, blockdev.Block) {
		return // a file's reader holds itself to it
	}
	id := s.published("text")
	e, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}, ReadOnly: true})
	s.ok(err)
	if !e.ReadOnly {
		s.Errorf("endpoint %+v", e)
	}
	writable := e
	writable.ReadOnly = false // a consumer that does not care
	if err := tryWrite(s, writable); err == nil {
		s.Error("a read-only device was written")
	}
	s.close(id, e)
	s.reads(id, 0, "text")
}

func tryWrite(s *suite, e blockdev.Endpoint) error {
	f := s.place.Access(s.T, e)
	_, err := f.WriteAt(make([]byte, 4096), 0)
	return errors.Join(err, f.Close())
}

func busyDevice(s *suite) {
	if !slices.Contains(s.place.Kinds, blockdev.Block) {
		return
	}
	id := s.published("text")
	e, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
	s.ok(err)
	user := s.place.Access(s.T, e)
	s.is(s.b.Close(s.ctx(), id, e.Lease), blockdev.ErrBusy, "close of a device in use")
	again, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
	if err != nil || again != e {
		s.Errorf("after a refused close: %+v, %v; want %+v", again, err, e)
	}
	s.put(user, 4096, "still there")
	s.ok(user.Close())
	s.close(id, e)
	s.reads(id, 4096, "still there")
}

func remove(s *suite) {
	s.ok(s.b.Remove(s.ctx(), NewID(blockdev.PrefixVolume)))
	id, other := s.published("text"), s.published("other")
	e := s.open(id, false)
	s.is(s.b.Remove(s.ctx(), id), blockdev.ErrBusy, "remove while open")
	s.close(id, e)
	s.reads(id, 0, "text")
	s.ok(s.b.Remove(s.ctx(), id))
	s.absent(id)
	s.restart()
	s.absent(id)
	s.ok(s.b.Remove(s.ctx(), id))
	s.reads(other, 0, "other")
	// The name can be used again and shows nothing of the past.
	s.ok(s.b.Create(s.ctx(), id, mib))
	s.reads(id, 0, "")
	s.ok(s.b.Remove(s.ctx(), id)) // a draft
	s.absent(id)
}

func list(s *suite) {
	want := map[blockdev.ID]bool{} // draft?
	for i := range 12 {
		id := NewID(blockdev.PrefixRevision)
		s.ok(s.b.Create(s.ctx(), id, mib*int64(i+1)))
		want[id] = i%3 == 0
		if !want[id] {
			s.ok(s.b.Publish(s.ctx(), id, []byte(id)))
		}
	}
	infos, err := s.b.List(s.ctx())
	s.ok(err)
	if len(infos) != len(want) {
		s.Errorf("%d are listed, want %d", len(infos), len(want))
	}
	for _, info := range infos {
		draft, there := want[info.ID]
		if !there || info.Draft != draft || (!draft && string(info.Description) != string(info.ID)) {
			s.Errorf("listed %+v", info)
		}
		if stat := s.stat(info.ID); stat.Size != info.Size || stat.Draft != info.Draft || stat.Allocated != info.Allocated {
			s.Errorf("listed as %+v, stat says %+v", info, stat)
		}
	}
}

func quarantine(s *suite) {
	good, bad := s.published("good"), s.published("bad")
	found, err := s.b.Quarantined(s.ctx())
	if err != nil || len(found) != 0 {
		s.Errorf("a healthy place has quarantined %v, %v", found, err)
	}
	s.place.Damage(s.T, bad)
	_, err = s.b.Stat(s.ctx(), bad)
	s.is(err, blockdev.ErrCorrupt, "stat of a damaged image")
	for range 2 {
		if got := s.listed(); len(got) != 1 || got[0] != good {
			s.Errorf("listed %v, want only %s", got, good)
		}
		found, err := s.b.Quarantined(s.ctx())
		if err != nil || len(found) != 1 || !strings.Contains(found[0].Name, string(bad)) || found[0].Reason == "" || found[0].Bytes <= 0 {
			s.Errorf("quarantined %+v, %v; want %s with reason and size", found, err, bad)
		}
		s.restart()
	}
	s.absent(bad)
	s.ok(s.b.Remove(s.ctx(), bad))
	if found, err := s.b.Quarantined(s.ctx()); err != nil || len(found) != 1 {
		s.Errorf("after Remove: %v, %v; the quarantine is not to be deleted", found, err)
	}
	s.reads(good, 0, "good")
}

func trim(s *suite) {
	trimmer, ok := s.b.(blockdev.Trimmer)
	if !ok {
		return
	}
	id := s.published("text")
	for at := int64(64 << 10); at < 512<<10; at += 4096 {
		s.write(id, at, "")
	}
	before := s.stat(id)
	e := s.open(id, false)
	_, err := trimmer.Trim(s.ctx(), id)
	s.is(err, blockdev.ErrBusy, "trim of an open image")
	s.close(id, e)
	freed, err := trimmer.Trim(s.ctx(), id)
	s.ok(err)
	after := s.stat(id)
	if freed < 448<<10 || before.Allocated-after.Allocated != freed || after.Size != before.Size {
		s.Errorf("freed %d: from %+v to %+v", freed, before, after)
	}
	s.reads(id, 0, "text")
	s.reads(id, mib-4096, "text")
	s.reads(id, 64<<10, "")
	_, err = trimmer.Trim(s.ctx(), NewID(blockdev.PrefixVolume))
	s.is(err, blockdev.ErrNotFound, "trim of nothing")
}

func foundAgain(s *suite) {
	id := s.published("text")
	s.ok(s.b.Grow(s.ctx(), id, 2*mib))
	for range 2 {
		s.restart()
		if info := s.stat(id); info.Draft || info.Size != 2*mib || string(info.Description) != "description of text" || info.Open {
			s.Errorf("after a restart: %+v", info)
		}
		s.reads(id, 0, "text")
		s.reads(id, mib-4096, "text")
	}
	// Every call again, as a caller does that does not know how far it came.
	s.ok(s.b.Publish(s.ctx(), id, []byte("later")))
	s.ok(s.b.Grow(s.ctx(), id, 2*mib))
	s.restart()
	if info := s.stat(id); string(info.Description) != "later" || info.Size != 2*mib {
		s.Errorf("after everything again: %+v", info)
	}
}

func draftsAfterRestart(s *suite) {
	id := NewID(blockdev.PrefixVolume)
	for range 3 {
		s.ok(s.b.Create(s.ctx(), id, mib))
		s.write(id, 0, "from before")
		s.open(id, false) // left open by the process that dies
		s.restart()
		if _, err := s.b.Stat(s.ctx(), id); err == nil && !s.stat(id).Draft {
			s.Error("a draft became an image")
		}
	}
	s.ok(s.b.Create(s.ctx(), id, mib))
	s.reads(id, 0, "")
	s.open(id, false)
	s.restart()
	s.ok(s.b.Remove(s.ctx(), id))
	s.absent(id)
}

func openAfterRestart(s *suite) {
	if !slices.Contains(s.place.Kinds, blockdev.Block) {
		return
	}
	id := s.published("text")
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}}
	e, err := s.b.Open(s.ctx(), id, want)
	s.ok(err)
	user := s.place.Access(s.T, e)
	for range 2 {
		s.restart()
		if !s.stat(id).Open {
			s.Error("the device of an earlier process is not shown")
		}
		s.is(s.b.Remove(s.ctx(), id), blockdev.ErrBusy, "remove while an earlier process's device is there")
		again, err := s.b.Open(s.ctx(), id, want)
		if err != nil || again != e {
			s.Errorf("open after a restart: %+v, %v; want %+v", again, err, e)
		}
	}
	s.put(user, 4096, "all the while") // the data path does not notice
	s.ok(s.b.Grow(s.ctx(), id, 2*mib))
	s.put(user, 2*mib-4096, "grown")
	s.ok(user.Close())
	s.restart()
	s.ok(s.b.Close(s.ctx(), id, e.Lease))
	if s.stat(id).Open {
		s.Error("still open")
	}
	s.reads(id, 4096, "all the while")
	s.reads(id, 2*mib-4096, "grown")
}

func canceled(s *suite) {
	id := s.published("text")
	ctx, cancel := context.WithCancel(s.ctx())
	cancel()
	_, statErr := s.b.Stat(ctx, id)
	_, listErr := s.b.List(ctx)
	for what, err := range map[string]error{
		"create": s.b.Create(ctx, NewID(blockdev.PrefixVolume), mib), "publish": s.b.Publish(ctx, id, nil),
		"describe": s.b.Describe(ctx, id, nil), "grow": s.b.Grow(ctx, id, 2*mib),
		"remove": s.b.Remove(ctx, id), "stat": statErr, "list": listErr,
	} {
		s.is(err, context.Canceled, what)
	}
	if info := s.stat(id); info.Size != mib || string(info.Description) != "description of text" {
		s.Errorf("a canceled call changed the image: %+v", info)
	}
}

func manyAtOnce(s *suite) {
	workers, rounds := 8, 4
	if s.place.Slow {
		workers, rounds = 3, 2
	}
	var wg sync.WaitGroup
	fail := func(err error) bool {
		if err != nil {
			s.Error(err)
		}
		return err != nil
	}
	kept := make([]blockdev.ID, workers)
	for w := range workers {
		wg.Go(func() {
			for round := range rounds {
				id := NewID(blockdev.PrefixVolume)
				text := fmt.Sprintf("worker %d round %d", w, round)
				if fail(s.b.Create(s.ctx(), id, mib)) {
					return
				}
				e, err := s.b.Open(s.ctx(), id, blockdev.Want{Kinds: s.place.Kinds})
				if fail(err) {
					return
				}
				f := s.place.Access(s.T, e)
				s.put(f, 0, text)
				if fail(f.Close()) || fail(s.b.Close(s.ctx(), id, e.Lease)) || fail(s.b.Publish(s.ctx(), id, []byte(text))) {
					return
				}
				if kept[w] != "" && fail(s.b.Remove(s.ctx(), kept[w])) {
					return
				}
				kept[w] = id
			}
		})
		wg.Go(func() {
			for range rounds {
				_, err := s.b.List(s.ctx())
				fail(err)
				_, err = s.b.Capacity(s.ctx())
				fail(err)
			}
		})
	}
	wg.Wait()
	if got := s.listed(); len(got) != workers {
		s.Errorf("%d images are left, want %d", len(got), workers)
	}
	for w, id := range kept {
		s.reads(id, 0, fmt.Sprintf("worker %d round %d", w, rounds-1))
	}
	if found, err := s.b.Quarantined(s.ctx()); err != nil || len(found) != 0 {
		s.Errorf("quarantined %v, %v", found, err)
	}
}

package metadata

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

type thing struct {
	Name string `json:"name"`
	N    int    `json:"n"`
}

var (
	things = Table[thing]{Name: "things"}
	others = Table[thing]{Name: "others"}
)

func openStore(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func put(t testing.TB, s *Store, key string, n int) {
	t.Helper()
	err := s.Update(t.Context(), func(tx *Tx) error { return things.Put(tx, key, thing{key, n}) })
	if err != nil {
		t.Fatal(err)
	}
}

// all reads the whole table in a View.
func all(t testing.TB, s *Store) map[string]int {
	t.Helper()
	got := map[string]int{}
	err := s.View(func(tx *Tx) error {
		return things.Scan(tx, "", func(key string, v thing) error {
			got[key] = v.N
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestRecordsLiveOverReopen(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	for i := range 10 {
		put(t, s, fmt.Sprintf("k%d", i), i)
	}
	err := s.Update(t.Context(), func(tx *Tx) error {
		if err := things.Delete(tx, "k3"); err != nil {
			return err
		}
		if err := things.Delete(tx, "never"); err != nil {
			return err
		}
		return things.Put(tx, "k4", thing{"k4", 44})
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]int{"k0": 0, "k1": 1, "k2": 2, "k4": 44, "k5": 5, "k6": 6, "k7": 7, "k8": 8, "k9": 9}
	if got := all(t, s); !maps.Equal(got, want) {
		t.Fatalf("%v, want %v", got, want)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), func(*Tx) error { return nil }); !errors.Is(err, ErrClosed) {
		t.Fatalf("Update after Close: %v", err)
	}
	if err := s.View(func(*Tx) error { return nil }); !errors.Is(err, ErrClosed) {
		t.Fatalf("View after Close: %v", err)
	}
	s = openStore(t, dir, Options{})
	if got := all(t, s); !maps.Equal(got, want) {
		t.Fatalf("after reopening: %v, want %v", got, want)
	}
	st, err := s.Stats()
	if err != nil || st.Records != int64(len(want)) || st.Sequence != 11 || st.TableBytes == 0 || st.FreeBytes == 0 {
		t.Fatalf("stats %+v, %v", st, err)
	}
}

func TestAFailedUpdateLeavesNothing(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	put(t, s, "a", 1)
	mine := errors.New("mine")
	err := s.Update(t.Context(), func(tx *Tx) error {
		if err := errors.Join(things.Put(tx, "a", thing{"a", 2}), things.Put(tx, "b", thing{"b", 2})); err != nil {
			return err
		}
		if v, err := things.Get(tx, "a"); err != nil || v.N != 2 {
			return fmt.Errorf("own write: %v, %w", v, err)
		}
		return mine
	})
	if !errors.Is(err, mine) {
		t.Fatal(err)
	}
	if got := all(t, s); !maps.Equal(got, map[string]int{"a": 1}) {
		t.Fatal(got)
	}
}

func TestCallersErrorsDoNotFailTheStore(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{OnFailure: func(err error) { t.Error(err) }})
	big := thing{Name: strings.Repeat("x", MaxRecord)}
	err := s.Update(t.Context(), func(tx *Tx) error { return things.Put(tx, "big", big) })
	if !errors.Is(err, ErrTooLarge) {
		t.Fatalf("a record over the bound: %v", err)
	}
	err = s.Update(t.Context(), func(tx *Tx) error {
		for i := range maxWrites + 1 {
			_ = things.Put(tx, fmt.Sprint(i), thing{}) // its error ignored, as a careless caller would
		}
		return nil
	})
	if !errors.Is(err, ErrTooLarge) {
		t.Fatalf("too many records: %v", err)
	}
	err = s.View(func(tx *Tx) error { return things.Put(tx, "a", thing{}) })
	if err == nil {
		t.Fatal("a View may write")
	}
	err = s.View(func(tx *Tx) error { _, err := things.Get(tx, "none"); return err })
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), `things "none"`) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Update(ctx, func(*Tx) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic of fn did not reach its caller")
			}
		}()
		_ = s.Update(t.Context(), func(tx *Tx) error { _ = things.Put(tx, "p", thing{}); panic("fn") })
	}()
	put(t, s, "still works", 1)
	if got := all(t, s); len(got) != 1 {
		t.Fatal(got)
	}
}

// The largest transactions that are taken go through Badger as well.
func TestFullTransactions(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{OnFailure: func(err error) { t.Error(err) }})
	half := thing{Name: strings.Repeat("x", MaxRecord-100)}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			err := s.Update(t.Context(), func(tx *Tx) error {
				return errors.Join(things.Put(tx, fmt.Sprint(g, "a"), half), things.Put(tx, fmt.Sprint(g, "b"), half))
			})
			if err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			err := s.Update(t.Context(), func(tx *Tx) error {
				for i := range maxWrites {
					if err := others.Put(tx, fmt.Sprint(g, i), thing{}); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s.Close()
	s = openStore(t, dir, Options{})
	if st, _ := s.Stats(); st.Records != 4*2+4*maxWrites {
		t.Fatalf("%d records", st.Records)
	}
}

// Transactions against a model: random puts, deletes, scans in all layers.
func TestScansMergeWhatIsPending(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	rnd := rand.New(rand.NewPCG(1, 2))
	key := func() string { return fmt.Sprintf("%c/%02d", 'a'+rnd.IntN(3), rnd.IntN(30)) }
	change := func(tx *Tx, model map[string]int) {
		for range rnd.IntN(20) {
			k := key()
			if rnd.IntN(3) == 0 {
				delete(model, k)
				if err := things.Delete(tx, k); err != nil {
					t.Error(err)
				}
				continue
			}
			model[k] = rnd.IntN(1000)
			if err := things.Put(tx, k, thing{k, model[k]}); err != nil {
				t.Error(err)
			}
		}
	}
	check := func(tx *Tx, model map[string]int) {
		prefix, start := []string{"", "a", "b/", "b/1", "zz"}[rnd.IntN(5)], ""
		if rnd.IntN(2) == 0 {
			start = key()
		}
		var want []string
		for k, n := range model {
			if strings.HasPrefix(k, prefix) && k >= start {
				want = append(want, fmt.Sprint(k, "=", n))
			}
		}
		slices.Sort(want)
		var got, keys []string
		err := things.ScanFrom(tx, prefix, start, func(k string, v thing) error {
			got = append(got, fmt.Sprint(k, "=", v.N))
			return things.Keys(tx, k, func(string) error { return nil }) // nested scans work
		})
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("prefix %q start %q: %v, want %v (%v)", prefix, start, got, want, err)
		}
		if err := things.Keys(tx, prefix, func(k string) error { keys = append(keys, k); return nil }); err != nil {
			t.Fatal(err)
		}
		for _, k := range keys {
			v, err := things.Get(tx, k)
			if n, ok := model[k]; err != nil || !ok || v.N != n {
				t.Fatalf("%q: %v, %v, want %d", k, v, err, n)
			}
		}
	}
	model := map[string]int{}
	for range 50 {
		// The batch layer is filled by hand, for one goroutine gets no shared batch.
		err := s.Update(t.Context(), func(tx *Tx) error {
			change(tx, model)
			check(tx, model)
			second := &Tx{txn: tx.txn, batch: tx.own, own: writes{}}
			change(second, model)
			check(second, model)
			maps.Copy(tx.own, second.own)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		_ = s.View(func(tx *Tx) error { check(tx, model); return nil })
	}
	if got := all(t, s); !reflect.DeepEqual(got, model) {
		t.Fatalf("%v, want %v", got, model)
	}
}

// Many clients count together; every increment is there, and commits are shared.
func TestConcurrentUpdatesAreSerial(t *testing.T) {
	dir := t.TempDir()
	var shared atomic.Int64
	s := openStore(t, dir, Options{ObserveCommit: func(_ time.Duration, n int) { shared.Add(int64(n)) }})
	put(t, s, "sum", 0)
	const clients, each = 32, 25
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := range each {
				err := s.Update(t.Context(), func(tx *Tx) error {
					v, err := things.Get(tx, "sum")
					if err != nil {
						return err
					}
					v.N++
					if i%5 == 4 {
						_ = things.Put(tx, "sum", thing{"wrong", -1})
						return errors.ErrUnsupported
					}
					return things.Put(tx, "sum", v)
				})
				if want := i%5 == 4; errors.Is(err, errors.ErrUnsupported) != want || (!want && err != nil) {
					t.Errorf("client %d: %v", c, err)
				}
			}
		})
	}
	wg.Wait()
	if got := all(t, s)["sum"]; got != clients*each*4/5 {
		t.Fatalf("sum %d, want %d", got, clients*each*4/5)
	}
	st, _ := s.Stats()
	if st.Updates != clients*each*4/5+1 || shared.Load() != st.Updates || st.Commits >= st.Updates {
		t.Fatalf("%d updates in %d commits, observed %d", st.Updates, st.Commits, shared.Load())
	}
	t.Logf("%d updates in %d commits of %v", st.Updates, st.Commits, st.CommitTime/time.Duration(st.Commits))
}

func TestUpdatesGiveUpTheirPlaceWhenTheContextEnds(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	inside, leave := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = s.Update(t.Context(), func(*Tx) error { close(inside); <-leave; return nil })
	})
	<-inside
	ctx, cancel := context.WithCancel(t.Context())
	for range 5 {
		wg.Go(func() {
			err := s.Update(ctx, func(*Tx) error { t.Error("ran"); return nil })
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	cancel()
	close(leave)
	wg.Wait()
	put(t, s, "after", 1)
}

func TestFailpoints(t *testing.T) {
	crash := errors.New("crash")
	at := ""
	s := openStore(t, t.TempDir(), Options{
		OnFailure: func(err error) { t.Error(err) },
		Failpoint: func(point string) error {
			if point == at {
				return crash
			}
			return nil
		},
	})
	update := func(key string) error {
		return s.Update(t.Context(), func(tx *Tx) error { return things.Put(tx, key, thing{key, 1}) })
	}
	at = "metadata.commit.before"
	if err := update("before"); !errors.Is(err, crash) {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), func(*Tx) error { return nil }); err != nil {
		t.Fatalf("nothing to commit, but %v", err)
	}
	at = "metadata.commit.after"
	if err := update("after"); !errors.Is(err, crash) {
		t.Fatal(err)
	}
	at = ""
	if err := update("none"); err != nil {
		t.Fatal(err)
	}
	if got := all(t, s); !maps.Equal(got, map[string]int{"after": 1, "none": 1}) {
		t.Fatal(got)
	}
}

func TestHeadroom(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{Headroom: 1 << 60})
	write := func(tx *Tx) error { return things.Put(tx, "a", thing{"a", 1}) }
	if err := s.Update(t.Context(), write); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("below the headroom: %v", err)
	}
	if err := s.UpdateFreeing(t.Context(), write); err != nil {
		t.Fatalf("freeing below the headroom: %v", err)
	}
	if got := all(t, s); len(got) != 1 {
		t.Fatal(got)
	}
}

// What Badger only logs is a failure too; then nothing is taken or shown any more.
func TestFailStop(t *testing.T) {
	var told []error
	s := openStore(t, t.TempDir(), Options{OnFailure: func(err error) { told = append(told, err) }})
	put(t, s, "a", 1)
	log := s.db.Opts().Logger
	log.Warningf("harmless")
	put(t, s, "b", 1)
	err := s.Update(t.Context(), func(tx *Tx) error {
		log.Errorf("Error while curlf sync: %v\n", "EIO") // during the commit, as it were
		return things.Put(tx, "c", thing{})
	})
	if !errors.Is(err, ErrFailed) {
		t.Fatalf("the update that failed: %v", err)
	}
	log.Warningf("While running doCompact: %v\n", "EIO")
	if err := s.Update(t.Context(), func(*Tx) error { return nil }); !errors.Is(err, ErrFailed) {
		t.Fatalf("a later update: %v", err)
	}
	if err := s.View(func(*Tx) error { return nil }); !errors.Is(err, ErrFailed) {
		t.Fatalf("a later view: %v", err)
	}
	if len(told) != 1 || !errors.Is(told[0], ErrFailed) || !strings.Contains(told[0].Error(), "EIO") {
		t.Fatalf("the owner was told %v", told)
	}
}

func TestOneProcessHasTheStore(t *testing.T) {
	dir := t.TempDir()
	openStore(t, dir, Options{})
	_, err := Open(dir, Options{})
	if !errors.Is(err, ErrLocked) || errors.Is(err, ErrDamaged) {
		t.Fatalf("second open: %v, want ErrLocked", err)
	}
	t.Log(err)
}

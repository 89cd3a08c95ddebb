package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/blockdevtest"
	"holdfast/metadata"
)

// stripes are a volume's data: in every third block, so that holes lie between.
func stripes(n int64) []byte { return bytes.Repeat([]byte{byte(n%250) + 1}, 4096) }

const stripeEach = 3 * 4096

func (w *world) image(t *testing.T, v Volume) (*blockdevtest.MemoryImage, error) {
	t.Helper()
	path := "mem:" + string(v.ID)
	if v.Pool != "" {
		path = v.Pool + ":" + path
	}
	image, err := w.Image(path)
	return image, err
}

func (w *world) stripe(t *testing.T, name string) {
	t.Helper()
	v, err := w.engine.Volume(space, name)
	if err != nil {
		t.Fatal(err)
	}
	image, err := w.image(t, v)
	if err != nil {
		t.Fatal(err)
	}
	for at := int64(0); at+4096 <= image.Size(); at += stripeEach {
		if _, err := image.WriteAt(stripes(at/stripeEach), at); err != nil {
			t.Fatal(err)
		}
	}
}

func (w *world) verifyStripes(t *testing.T, name string) {
	t.Helper()
	v, err := w.engine.Volume(space, name)
	if err != nil {
		t.Fatal(err)
	}
	image, err := w.image(t, v)
	if err != nil {
		t.Fatal(err)
	}
	all := make([]byte, image.Size())
	if _, err := image.ReadAt(all, 0); err != nil {
		t.Fatal(err)
	}
	for at := int64(0); at+4096 <= image.Size(); at += 4096 {
		want := make([]byte, 4096)
		if at%stripeEach == 0 {
			want = stripes(at / stripeEach)
		}
		if !bytes.Equal(all[at:at+4096], want) {
			t.Fatalf("volume %s in pool %q differs at %d", name, v.Pool, at)
		}
	}
}

// moveTo asks for a move and works until it has ended.
func (w *world) moveTo(name, pool string) error {
	ctx := context.Background()
	if _, err := w.engine.MoveVolume(ctx, space, name, pool, "somebody"); err != nil {
		return err
	}
	for {
		v, err := w.engine.Volume(space, name)
		if err != nil || v.Move == nil {
			return err
		}
		if err := w.engine.tend(ctx); err != nil {
			return err
		}
	}
}

// verifyPools holds records, pools and accounts against each other: each volume has
// one image, in its pool, or two while it is moved.
func (w *world) verifyPools(t *testing.T) {
	t.Helper()
	ctx := context.Background()
	page, err := w.engine.List(space, Query{})
	if err != nil {
		t.Fatal(err)
	}
	want, promised := map[string]bool{}, map[string]int64{}
	for _, v := range page.Volumes {
		want[v.Pool+"/"+string(v.ID)] = true
		promised[v.Pool] += v.bytes()
		if v.Move != nil {
			t.Errorf("volume %s is still being moved: %+v", v.Name, v.Move)
		}
	}
	found := map[string]bool{}
	for name, pool := range map[string]blockdev.Backend{"": w.pool, secondPool: w.second} {
		images, err := pool.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, info := range images {
			found[name+"/"+string(info.ID)] = true
			if info.Open || info.Draft {
				t.Errorf("%s in pool %q: open %v, draft %v", info.ID, name, info.Open, info.Draft)
			}
			if said, err := parseDescription(info.Description); err != nil || said.Incoming || said.Pool != name {
				t.Errorf("%s in pool %q says: %+v, %v", info.ID, name, said, err)
			}
		}
	}
	if !maps.Equal(found, want) {
		t.Errorf("the volumes are %v, the images %v", slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(found)))
	}
	for _, name := range []string{"", secondPool} {
		var s PoolStatus
		w.engine.ledger(name).status(&s)
		if s.Provisioned != promised[name] {
			t.Errorf("pool %q has promised %d bytes, its volumes have %d", name, s.Provisioned, promised[name])
		}
	}
	if u := w.engine.o.Ledger.shares.all[space]; u != nil && (u.volumes != int64(len(page.Volumes)) || u.bytes != promised[""]+promised[secondPool]) {
		t.Errorf("the workspace's share is %+v", *u)
	}
}

func rawOp(t *testing.T, w *world, name, pool string, size int64) Volume {
	t.Helper()
	v, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Name: name, Filesystem: "none", Pool: pool, SizeMiB: mib(size),
		Labels: map[string]string{"a": "b"}, IdempotencyKey: "key-" + name})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestMove(t *testing.T) {
	w := newWorldOfTwo(t)
	ctx := context.Background()
	before := rawOp(t, w, "v", "", 1)
	if _, err := w.engine.Attach(ctx, space, "v", AttachVolume{Holder: "sandbox:m", Target: attach.Target{Type: "vm", Container: "m"}}); err != nil {
		t.Fatal(err)
	}
	if err := w.moveTo("v", secondPool); !errors.Is(err, ErrAttached) {
		t.Fatalf("moving an attached volume: %v", err)
	}
	if err := detachOp("v", "m").do(w); err != nil {
		t.Fatal(err)
	}
	w.stripe(t, "v")
	if err := w.moveTo("v", secondPool); err != nil {
		t.Fatal(err)
	}
	w.verifyPools(t)
	w.verifyStripes(t, "v")
	v, err := w.engine.Volume(space, "v")
	if err != nil {
		t.Fatal(err)
	}
	if v.ID != before.ID || v.Pool != secondPool || !v.Tainted || v.Epoch != 1 || v.Labels["a"] != "b" || v.UpdatedBy != "somebody" {
		t.Errorf("the moved volume is %+v", v)
	}
	if err := w.moveTo("v", secondPool); err != nil {
		t.Errorf("moving to where it is: %v", err)
	}
	if err := w.moveTo("v", "memory"); err != nil {
		t.Fatal(err)
	}
	w.verifyPools(t)
	w.verifyStripes(t, "v")
}

func TestMoveRefused(t *testing.T) {
	w := newWorldOfTwo(t)
	rawOp(t, w, "v", "", 1)
	for pool, want := range map[string]error{"": ErrInvalid, "nowhere": ErrInvalid} {
		var p *Problem
		if err := w.moveTo("v", pool); !errors.Is(err, want) || !errors.As(err, &p) || p.Field != "pool" {
			t.Errorf("moving to %q: %v", pool, err)
		}
	}
	if err := w.moveTo("w", secondPool); !errors.Is(err, ErrNotFound) {
		t.Errorf("moving what is not there: %v", err)
	}
	rawOp(t, w, "large", "", 9<<10)
	if err := w.moveTo("large", secondPool); !errors.Is(err, ErrNoSpace) {
		t.Errorf("moving what does not fit: %v", err)
	}
	w.engine.o.Copy = nil
	if err := w.moveTo("v", secondPool); !errors.Is(err, ErrUnsupported) {
		t.Errorf("moving without a copier: %v", err)
	}
	w.verifyPools(t)
}

// onTheWay begins a move, and stops it after its first pieces.
func onTheWay(t *testing.T, w *world) Volume {
	t.Helper()
	rawOp(t, w, "v", "", 1)
	w.stripe(t, "v")
	if _, err := w.engine.MoveVolume(context.Background(), space, "v", secondPool, ""); err != nil {
		t.Fatal(err)
	}
	w.failAt(t, "before copy", 4)
	v, err := w.engine.Volume(space, "v")
	if err != nil || v.Move == nil || v.Move.Done != 3*copyPiece || v.Move.Copied == 0 || v.Move.Failure == "" {
		t.Fatalf("on its way: %+v, %v", v.Move, err)
	}
	return v
}

// failAt tends once, with the n-th side effect of a name failing.
func (w *world) failAt(t *testing.T, name string, n int) {
	t.Helper()
	copyOf := w.engine.o.Copy
	defer func() { w.engine.o.Copy = copyOf }()
	w.engine.o.Copy = func(ctx context.Context, dst, src string, from, most int64) (int64, int64, error) {
		if n--; n == 0 {
			return from, 0, fmt.Errorf("%s: %w", name, errInjected)
		}
		return copyOf(ctx, dst, src, from, most)
	}
	if err := w.engine.tend(context.Background()); !errors.Is(err, errInjected) {
		t.Fatalf("tend: %v", err)
	}
}

func TestVolumeOnItsWay(t *testing.T) {
	ctx := context.Background()
	for name, try := range map[string]func(w *world) error{
		"attach": func(w *world) error {
			_, err := w.engine.Attach(ctx, space, "v", AttachVolume{Holder: "sandbox:m", Target: attach.Target{Type: "vm", Container: "m"}})
			return err
		},
		"grow": func(w *world) error {
			_, err := w.engine.ChangeVolume(ctx, space, "v", ChangeVolume{SizeMiB: mib(2)})
			return err
		},
		"trim": func(w *world) error { _, err := w.engine.TrimVolume(ctx, space, "v"); return err },
		"capture": func(w *world) error {
			_, err := w.engine.CaptureVolume(ctx, space, "v", CaptureVolume{Template: "t"})
			return err
		},
		"list": func(w *world) error { _, err := w.engine.ListDir(ctx, space, "v", "/"); return err },
	} {
		w := newWorldOfTwo(t)
		onTheWay(t, w)
		if err := try(w); !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v, want ErrConflict", name, err)
		}
	}
	w := newWorldOfTwo(t)
	onTheWay(t, w)
	if _, err := w.engine.ChangeVolume(ctx, space, "v", ChangeVolume{Labels: map[string]string{"new": "label"}}); err != nil {
		t.Fatal(err)
	}
	if err := w.moveTo("v", secondPool); err != nil {
		t.Fatalf("the same move again: %v", err)
	}
	w.verifyPools(t)
	w.verifyStripes(t, "v")
	if v, _ := w.engine.Volume(space, "v"); v.Labels["new"] != "label" {
		t.Errorf("the change got lost: %+v", v)
	}
}

func TestMoveGoesOnWhereItWas(t *testing.T) {
	for _, power := range []bool{false, true} {
		w := newWorldOfTwo(t)
		onTheWay(t, w)
		w.restart(power)
		w.arm(0, false)
		if err := w.moveTo("v", secondPool); err != nil {
			t.Fatal(err)
		}
		pieces := 0
		for _, p := range w.points {
			if p == "before copy" {
				pieces++
			}
		}
		if pieces != 1<<20/copyPiece-3 {
			t.Errorf("power %v: %d pieces were copied after the restart", power, pieces)
		}
		w.verifyPools(t)
		w.verifyStripes(t, "v")
	}
}

func TestMoveTakenBack(t *testing.T) {
	w := newWorldOfTwo(t)
	onTheWay(t, w)
	if err := w.moveTo("v", "memory"); err != nil {
		t.Fatal(err)
	}
	w.verifyPools(t)
	w.verifyStripes(t, "v")
	w.restart(true)
	w.verifyPools(t)
	if err := w.moveTo("v", secondPool); err != nil {
		t.Fatal(err)
	}
	w.verifyPools(t)
	w.verifyStripes(t, "v")
}

// What an earlier move has left in the pool does not show through the holes of the
// next one.
func TestMoveOverLeftovers(t *testing.T) {
	w := newWorldOfTwo(t)
	v := onTheWay(t, w)
	stale, err := w.second.Image("mem:" + string(v.ID))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stale.WriteAt(stripes(9), 4096); err != nil {
		t.Fatal(err)
	}
	v = v.clone()
	v.Move = nil // as if the move was taken back while the pool did not answer
	if err := w.engine.commit(context.Background(), v); err != nil {
		t.Fatal(err)
	}
	if err := w.moveTo("v", secondPool); err != nil {
		t.Fatal(err)
	}
	w.verifyPools(t)
	w.verifyStripes(t, "v")
}

func TestDeleteOnTheWay(t *testing.T) {
	for _, restart := range []bool{false, true} {
		w := newWorldOfTwo(t)
		onTheWay(t, w)
		if restart {
			w.restart(true)
		}
		if err := deleteOp("v").do(w); err != nil {
			t.Fatal(err)
		}
		w.verifyPools(t)
		w.restart(true)
		w.verifyPools(t)
	}
}

// A half copy is no volume, whatever else is there.
func TestRebuildOnTheWay(t *testing.T) {
	w := newWorldOfTwo(t)
	onTheWay(t, w)
	w.loseRecords(t)
	w.verifyPools(t)
	w.verifyStripes(t, "v")
	if v, err := w.engine.Volume(space, "v"); err != nil || v.Pool != "" {
		t.Errorf("after the rebuild: %+v, %v", v, err)
	}
}

// loseRecords starts again with an empty store.
func (w *world) loseRecords(t *testing.T) {
	t.Helper()
	err := w.store.Update(context.Background(), func(tx *metadata.Tx) error {
		var ids []string
		if err := volumesTable.Scan(tx, "", func(id string, _ Volume) error { ids = append(ids, id); return nil }); err != nil {
			return err
		}
		for _, id := range ids {
			if err := volumesTable.Delete(tx, id); err != nil {
				return err
			}
		}
		var keys []string
		if err := idempotencyTable.Scan(tx, "", func(key string, _ remembered) error { keys = append(keys, key); return nil }); err != nil {
			return err
		}
		for _, key := range keys {
			if err := idempotencyTable.Delete(tx, key); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.restart(true)
}

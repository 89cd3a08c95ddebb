package sparse

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/loop"
)

// made publishes an image that begins with a text, and opens its device.
func made(t *testing.T, p *Pool, text string, readOnly bool) (blockdev.ID, blockdev.Endpoint) {
	t.Helper()
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(p.Create(t.Context(), id, 1<<20), os.WriteFile(p.draft(id)+"/"+imageFile, padded(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := p.Publish(t.Context(), id, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	e, err := p.Open(t.Context(), id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}, ReadOnly: readOnly})
	if err != nil {
		t.Fatal(err)
	}
	return id, e
}

func padded(text string) []byte {
	b := make([]byte, 1<<20)
	copy(b, text)
	return b
}

func (p *Pool) begins(t *testing.T, id blockdev.ID) string {
	t.Helper()
	b, err := os.ReadFile(p.image(id) + "/" + imageFile)
	if err != nil {
		t.Fatal(err)
	}
	return string(bytes.TrimRight(b[:64], "\x00"))
}

// TestSever: who holds the device goes on writing, and reaches the image no more,
// nor the device that the image gets next.
func TestSever(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool)
	blockdevtest.LeakCheck(t)
	k := keep(t, filepath.Join(blockdevtest.ReflinkDir(t), "pool"))
	p := k.open(t)
	ctx := t.Context()
	id, e := made(t, p, "before", false)
	holder, err := os.OpenFile(e.Path, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if _, err := holder.WriteAt(padded(text)[:4096], 0); err != nil {
			t.Fatal(err)
		}
	}
	write("until severed")
	if err := errors.Join(p.CanSever(ctx, id), p.Sever(ctx, id), p.Sever(ctx, id)); err != nil {
		t.Fatal(err)
	}
	write("after it")
	if got := p.begins(t, id); got != "until severed" {
		t.Errorf("the image begins with %q", got)
	}
	p = k.open(t) // also for the next process
	next, err := p.Open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
	if err != nil || next.Path == e.Path {
		t.Fatalf("opened as %+v, %v", next, err)
	}
	write("still there")
	if b, err := os.ReadFile(next.Path); err != nil || !bytes.HasPrefix(b, []byte("until severed\x00")) {
		t.Errorf("the new device begins with %.20q, %v", b, err)
	}
	if err := holder.Close(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := loop.Inspect(e.Path); errors.Is(err, blockdev.ErrNotFound) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the old device stays after its last close")
		}
	}
	if err := p.Close(ctx, id, next.Lease); err != nil {
		t.Error(err)
	}
	if names, err := os.ReadDir(p.image(id)); err != nil || len(names) != 3 {
		t.Errorf("beside the image: %v, %v", names, err)
	}
}

// TestSeverWhereNoReflinkIs is refused, and nothing has changed.
func TestSeverWhereNoReflinkIs(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop)
	blockdevtest.LeakCheck(t)
	p := keep(t, filepath.Join(t.TempDir(), "pool")).open(t)
	ctx := t.Context()
	id, e := made(t, p, "text", false)
	if err := p.CanSever(ctx, id); !errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("the directory for temporary files has reflinks: %v", err)
	}
	if err := p.Sever(ctx, id); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("sever: %v", err)
	}
	again, err := p.Open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
	if err != nil || again != e {
		t.Errorf("opened as %+v, %v; was %+v", again, err, e)
	}
	if names, err := os.ReadDir(p.image(id)); err != nil || len(names) != 3 {
		t.Errorf("beside the image: %v, %v", names, err)
	}
	if err := p.Close(ctx, id, e.Lease); err != nil {
		t.Error(err)
	}
}

// TestReadOnlyDevice: the device itself takes no write, not from root, who may even
// take the mark away.
func TestReadOnlyDevice(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop)
	blockdevtest.LeakCheck(t)
	p := keep(t, filepath.Join(t.TempDir(), "pool")).open(t)
	id, e := made(t, p, "to be read", true)
	if out, err := exec.Command("blockdev", "--getro", e.Path).Output(); err != nil || string(out) != "1\n" {
		t.Errorf("BLKROGET: %s, %v", out, err)
	}
	try := func(when string) {
		t.Helper()
		f, err := os.OpenFile(e.Path, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteAt(padded("written")[:4096], 0)
			err = errors.Join(err, f.Sync(), f.Close())
		}
		if err == nil {
			t.Errorf("%s: a write went through", when)
		}
	}
	try("read-only")
	if out, err := exec.Command("blockdev", "--setrw", e.Path).CombinedOutput(); err != nil {
		t.Logf("the mark stays: %s", out)
	}
	try("with the mark taken away")
	if got := p.begins(t, id); got != "to be read" {
		t.Errorf("the image begins with %q", got)
	}
	if err := p.Close(t.Context(), id, e.Lease); err != nil {
		t.Error(err)
	}
}

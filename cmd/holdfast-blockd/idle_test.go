package main_test

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/vhost/frontend"
)

// ticks are what a process has used of the processor.
func ticks(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + itoa(pid) + "/stat")
	must(t, err)
	return strings.Join(strings.Fields(string(b))[13:15], "+")
}

// mostResident is what an idle worker may have in memory, in kB, what all workers share
// of the program among it.
const mostResident = 8 << 10

// TestIdleWorkers holds workers that wait to what they may occupy, with a client each
// that has used the volume.
func TestIdleWorkers(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	for name, spec := range map[string]control.Spec{
		"flat, vhost-user":    flat(t, blockdev.VhostUser),
		"flat, NBD":           flat(t, blockdev.NBD),
		"layered, vhost-user": {ID: volumeID, Kind: blockdev.VhostUser, Size: size, Layers: []control.Layer{layer(t)}, Base: base(t), BaseSize: size},
		"layered, NBD":        {ID: volumeID, Kind: blockdev.NBD, Size: size, Layers: []control.Layer{layer(t)}, Base: base(t), BaseSize: size},
	} {
		w, err := s.Serve(ctx, spec)
		must(t, err)
		show := func(when string) {
			t.Logf("%s, %s: resident %s: anonymous %s, files %s; %s threads; %s ticks", name, when, procStatus(t, w.Pid(), "VmRSS"), procStatus(t, w.Pid(), "RssAnon"), procStatus(t, w.Pid(), "RssFile"), procStatus(t, w.Pid(), "Threads"), ticks(t, w.Pid()))
		}
		show("alone")
		if spec.Kind == blockdev.NBD {
			c := dialNBD(t, w.Socket())
			c.write(0, stamped(1))
			c.flush()
		} else {
			g := newGuest(t, frontend.Options{})
			must(t, g.f.Connect(w.Socket()))
			g.good(frontend.Write, 0, block)
			g.good(frontend.Flush, 0, 0)
		}
		resident(t, w.Pid(), name+", with a client")
		must(t, w.Stop(ctx))
	}
}

// TestIdleOverALargeBase: the digests of a base far away, 50 MiB for 100 GiB, are not
// held in memory, nor is what was fetched for readers once all is here.
func TestIdleOverALargeBase(t *testing.T) {
	s, ctx, store := starter(t, nil), t.Context(), newFarStore(t)
	store.answer()
	const large = 100 << 30
	digests := make([]byte, large/overlay.DefaultChunk*32)
	_, _ = rand.NewChaCha8([32]byte{}).Read(digests)
	sum := sha256.Sum256(store.image[:overlay.DefaultChunk])
	copy(digests, sum[:])
	f, err := os.Create(filepath.Join(t.TempDir(), "digests"))
	must(t, err)
	defer f.Close()
	must(t, overlay.WriteChunks(f, overlay.Chunks{Size: large, Chunk: overlay.DefaultChunk, Digests: bytes.NewReader(digests)}))
	w, err := s.Serve(ctx, control.Spec{
		ID: volumeID, Kind: blockdev.VhostUser, Size: large, Layers: []control.Layer{layerOf(t, large)}, Remote: &control.Remote{URL: store.URL, Chunks: f},
	})
	must(t, err)
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	g.good(frontend.Read, 8, block)
	if !bytes.Equal(g.f.Queues[0].Data(0), stamped(2)) {
		t.Error("it reads as something else")
	}
	resident(t, w.Pid(), "over a base of 100 GiB")
	must(t, w.Stop(ctx))
}

// TestIdleAfterHydration: what hydration took of memory is given back.
func TestIdleAfterHydration(t *testing.T) {
	s, ctx, store := starter(t, nil), t.Context(), newFarStore(t)
	store.answer()
	spec := store.spec(t, blockdev.VhostUser)
	spec.Hydrate = true
	w, err := s.Serve(ctx, spec)
	must(t, err)
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	for n := range uint64(size / block) {
		g.good(frontend.Read, n*block/512, block)
	}
	hydrated(t, w, nil)
	resident(t, w.Pid(), "after hydration")
	must(t, w.Stop(ctx))
}

func residentKB(t *testing.T, pid int) int {
	t.Helper()
	kb, err := strconv.Atoi(strings.Fields(procStatus(t, pid, "VmRSS"))[0])
	must(t, err)
	return kb
}

func resident(t *testing.T, pid int, what string) {
	t.Helper()
	// What it does not need any more it gives back a moment after it could.
	for end := time.Now().Add(time.Minute); residentKB(t, pid) > mostResident && time.Now().Before(end); {
		runtime.Gosched()
	}
	t.Logf("%s: resident %s: anonymous %s, files %s", what, procStatus(t, pid, "VmRSS"), procStatus(t, pid, "RssAnon"), procStatus(t, pid, "RssFile"))
	if kb := residentKB(t, pid); kb > mostResident {
		t.Errorf("%s: %d kB are resident", what, kb)
	}
}

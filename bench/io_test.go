package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/vhost/frontend"
)

// TestMedianWithin: the interval holds the true median as often as it says, and
// leaves out what the tables of the sign test say.
func TestMedianWithin(t *testing.T) {
	for n, outside := range map[int]int{1: 0, 5: 0, 6: 0, 9: 1, 15: 3, 20: 5, 25: 7} {
		values := make([]float64, n)
		for i := range values {
			values[i] = float64(n - i)
		}
		m, low, high := medianWithin(values)
		if m != float64(n+1)/2 || low != float64(1+outside) || high != float64(n-outside) {
			t.Errorf("of %d: %v, %v to %v", n, m, low, high)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	missed := 0
	for range 2000 {
		values := make([]float64, 15)
		for i := range values {
			values[i] = r.NormFloat64()
		}
		if _, low, high := medianWithin(values); low > 0 || high < 0 {
			missed++
		}
	}
	if missed > 100 {
		t.Errorf("%d of 2000 intervals miss the median", missed)
	}
}

// TestJobsAreUnderstood: every job file says the same to fio and to our own load
// generator, and what ours does not know is refused.
func TestJobsAreUnderstood(t *testing.T) {
	jobs, err := ioJobs()
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]ioJob{}
	for _, j := range jobs {
		if j.about == "" || j.text == "" {
			t.Errorf("%s says nothing", j.name)
		}
		known[j.name] = ioJob{reads: j.reads, random: j.random, once: j.once, block: j.block, depth: j.depth, flush: j.flush}
	}
	for name, want := range map[string]ioJob{
		"randread-4k-qd32": {reads: 100, random: true, block: 4096, depth: 32},
		"mixed-4k-qd8":     {reads: 70, random: true, block: 4096, depth: 8},
		"fsync-4k-qd1":     {once: true, block: 4096, depth: 1, flush: true},
		"write-1m-qd8":     {once: true, block: 1 << 20, depth: 8},
	} {
		got, ok := known[name]
		if !ok || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	for _, bad := range []string{"", "bs=4k\n", "[a]\nrw=read\n", "[a]\nrw=read\nbs=4k\nverify=1\n", "[a]\nrw=write\nbs=4k\niodepth=2\nfsync=1\n", "[a]\nbs=4k\nnonsense\n"} {
		if j, err := parseJob(bad); err == nil {
			t.Errorf("%q is %v", bad, j)
		}
	}
}

// TestStridesVisitAll: a job that writes no block twice reaches each of them.
func TestStridesVisitAll(t *testing.T) {
	for _, n := range []uint64{1, 2, 3, 7, 64, 1000, 4095} {
		step, at, seen := coprime(n), uint64(0), map[uint64]bool{}
		for range n {
			at = (at + step) % n
			seen[at] = true
		}
		if uint64(len(seen)) != n {
			t.Errorf("%d of %d blocks, in steps of %d", len(seen), n, step)
		}
	}
}

// TestQuickServers has the benches of our servers run once, with real workers: they
// must not rot.
func TestQuickServers(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	blockdevtest.LeakCheck(t)
	program := buildHoldfast(t)
	t.Run("load", func(t *testing.T) { tryLoad(t, filepath.Join(filepath.Dir(program), "holdfast-blockd")) })
	t.Run("io", func(t *testing.T) { tryIO(t, program) })
	t.Run("worker", func(t *testing.T) { tryWorker(t, program) })
}

// tryLoad: the load generator does what the job says, to the bytes.
func tryLoad(t *testing.T, blockd string) {
	image := filepath.Join(t.TempDir(), "image")
	const blocks = 64
	if err := os.WriteFile(image, make([]byte, blocks*4096), 0o600); err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- ServeOptions{Image: image, Kind: blockdev.VhostUser, Blockd: blockd}.Serve(ctx, w)
		_ = w.Close() // nothing is said any more
	}()
	var said Serving
	if err := json.NewDecoder(r).Decode(&said); err != nil {
		t.Fatal(err, <-served)
	}
	socket := said.Socket
	j, err := parseJob("[all]\nrw=randwrite\nbs=4k\niodepth=8\n")
	if err != nil {
		t.Fatal(err)
	}
	l, err := newVhostLoad(socket, j)
	if err != nil {
		t.Fatal(err)
	}
	for l.requests < 4*blocks { // however slow the machine is
		if _, err := l.run(time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.f.Close(); err != nil {
		t.Error(err)
	}
	if len(l.took) != l.requests || slices.Max(l.took) == 0 {
		t.Errorf("%d latencies of %d requests", len(l.took), l.requests)
	}
	for _, text := range []string{"[log]\nrw=write\nbs=4k\nfsync=1\n", "[mix]\nrw=randrw\nrwmixread=70\nbs=4k\niodepth=4\nnorandommap=1\n"} {
		if j, err = parseJob(text); err != nil {
			t.Fatal(err)
		}
		s, requests, err := loadVhost(t.Context(), socket, j, 20*time.Millisecond)
		if err != nil || requests == 0 || s.iops <= 0 || s.p50 <= 0 || s.p999 < s.p50 {
			t.Errorf("%s: %v requests, %+v, %v", j.name, requests, s, err)
		}
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	got, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for n := range blocks {
		if bytes.Equal(got[n*4096:(n+1)*4096], make([]byte, 4096)) {
			t.Errorf("block %d was not written", n)
		}
	}
}

// tryIO takes two jobs on every path.
func tryIO(t *testing.T, program string) {
	b := IO{Setting: Setting{Dir: t.TempDir(), Quick: true, Log: t.Output()}, Program: program}
	report, err := b.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]bool{}
	for _, row := range report.Rows {
		told[row.Path+" beside "+row.Yardstick] = true
		if row.Ratio <= 0 && row.Unit == "/s" || row.Samples != b.Rounds {
			t.Errorf("nothing was measured for %q", row.Measure)
		}
	}
	for _, pair := range ioPairs() {
		left := slices.ContainsFunc(report.Notes, func(note string) bool { return strings.HasPrefix(note, b.named(pair.beside)+" was left out") })
		if !left && !told[pair.ours+" beside "+b.named(pair.beside)] {
			t.Errorf("nothing is told of %s beside %s", pair.ours, pair.beside)
		}
	}
}

// buildHoldfast makes the CLI and, beside it, the worker.
func buildHoldfast(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", dir+"/", "holdfast/cmd/holdfast", "holdfast/cmd/holdfast-blockd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return filepath.Join(dir, "holdfast")
}

// tryWorker watches idle servers for a second.
func tryWorker(t *testing.T, program string) {
	w := Worker{Setting: Setting{Dir: t.TempDir(), Quick: true, Log: t.Output()}, Program: program}
	report, err := w.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Rows) != 6 {
		t.Errorf("%d rows", len(report.Rows))
	}
	for _, row := range report.Rows {
		if row.Unit == "MB" && row.P50 < 1 {
			t.Errorf("%s is %v", row.Measure, row.P50)
		}
	}
}

// TestHandover: requests that are handed to the yardstick's thread are done on the
// file, and those that fail are told.
func TestHandover(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	const blocks, block = 64, 4096
	if err := os.WriteFile(image, make([]byte, blocks*block), 0o600); err != nil {
		t.Fatal(err)
	}
	j, err := parseJob("[all]\nrw=randwrite\nbs=4k\niodepth=8\n")
	if err != nil {
		t.Fatal(err)
	}
	h, err := newHandover(image, j.depth, j.block)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	for l := newLoad(j, h, h, blocks*block); l.requests < 8*blocks; {
		if _, err := l.run(time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for n := range blocks {
		if bytes.Equal(got[n*block:][:block], make([]byte, block)) {
			t.Errorf("block %d was not written", n)
		}
	}
	h.Put(0, frontend.Read, 7*block/512, block)
	h.Put(1, frontend.Read, blocks*block/512, block) // past the end
	h.Put(2, frontend.Flush, 0, 0)
	if err := h.Show(); err != nil {
		t.Fatal(err)
	}
	status := map[int]byte{}
	for len(status) < 3 {
		if err := h.Wait(); err != nil {
			t.Fatal(err)
		}
		for slot, s, ok := h.Take(); ok; slot, s, ok = h.Take() {
			status[slot] = s
		}
	}
	if status[0] != 0 || status[1] == 0 || status[2] != 0 || !bytes.Equal(h.Data(0), got[7*block:][:block]) {
		t.Errorf("read %v, or another block than was asked for", status)
	}
}

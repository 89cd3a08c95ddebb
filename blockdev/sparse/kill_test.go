package sparse

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// victimVariable makes the test program the one that is killed: it holds the
// pool's directory.
const victimVariable = "HOLDFAST_TEST_POOL"

// TestMain is the victim when it is told to be.
func TestMain(m *testing.M) {
	if dir := os.Getenv(victimVariable); dir != "" {
		victim(dir)
		os.Exit(1) // only after an error: its work has no end
	}
	code := m.Run()
	if blockdDir != "" {
		_ = os.RemoveAll(blockdDir)
	}
	os.Exit(code)
}

// victim uses a pool until it is killed, and tells what was acknowledged: a line
// "+ID" for an image that is there from now on, "-ID" before one is removed.
func victim(dir string) {
	ctx := context.Background()
	p, err := Open(ctx, dir, Options{})
	if err != nil {
		fmt.Println("!", err)
		return
	}
	must := func(err error) {
		if err != nil {
			fmt.Println("!", err)
			os.Exit(1)
		}
	}
	infos, err := p.List(ctx)
	must(err)
	for _, info := range infos { // what the one before left
		if info.Draft {
			must(p.Remove(ctx, info.ID))
		} else if info.Open {
			e, err := p.Open(ctx, info.ID, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
			must(err)
			must(p.Close(ctx, info.ID, e.Lease))
		}
	}
	var last blockdev.ID
	size := int64(1 << 20)
	for {
		id := blockdevtest.NewID("vol")
		if last == "" {
			must(p.Create(ctx, id, size))
		} else {
			must(p.Clone(ctx, id, last, size))
		}
		must(p.Publish(ctx, id, []byte(id)))
		fmt.Println("+" + string(id))
		e, err := p.Open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
		must(err)
		size += 1 << 20
		must(p.Grow(ctx, id, size))
		must(p.Close(ctx, id, e.Lease))
		must(p.Describe(ctx, id, []byte(id)))
		if last != "" && rand.IntN(2) == 0 {
			fmt.Println("-" + string(last))
			must(p.Remove(ctx, last))
		}
		if last = id; rand.IntN(5) == 0 {
			last, size = "", 1<<20
		}
	}
}

// TestKilled kills a process that uses a pool, at random moments, again and
// again. Nothing that it acknowledged is lost, nothing is quarantined, and the
// next one takes over its devices.
func TestKilled(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool)
	blockdevtest.LeakCheck(t)
	dir := filepath.Join(blockdevtest.ReflinkDir(t), "pool")
	kept, removing := map[string]bool{}, map[string]bool{}
	const rounds = 40
	for range rounds {
		killAfter(t, dir, 1+rand.IntN(3), time.Duration(rand.IntN(10_000))*time.Microsecond, kept, removing)
	}
	k := keep(t, dir)
	p := k.open(t)
	infos, err := p.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, info := range infos {
		there[string(info.ID)] = true
		if !info.Draft && string(info.Description) != string(info.ID) {
			t.Errorf("%s is described as %q", info.ID, info.Description)
		}
	}
	for id := range kept {
		if !there[id] && !removing[id] {
			t.Errorf("%s was acknowledged and is lost", id)
		}
	}
	if found, err := p.Quarantined(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("quarantined %v, %v", found, err)
	}
	if loops := blockdevtest.LoopsUnder(t, dir); len(loops) > 1 {
		t.Errorf("devices %v: more than the last one's", loops)
	}
}

// killAfter runs a victim and kills it some time after it acknowledged its n-th
// image.
func killAfter(t *testing.T, dir string, n int, after time.Duration, kept, removing map[string]bool) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), victimVariable+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }() // it was killed
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		switch kind, id := lines.Text()[:1], strings.TrimSpace(lines.Text()[1:]); kind {
		case "+":
			kept[id] = true
			if n--; n == 0 {
				time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
			}
		case "-":
			removing[id] = true
		default:
			_ = cmd.Process.Kill()
			t.Fatalf("victim: %s", lines.Text())
		}
	}
}

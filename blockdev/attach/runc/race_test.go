package runc_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/blockdev/filesystem"
)

// raceVariable sets another number of attaches than races, for a soak.
const (
	raceVariable = "HOLDFAST_RACES"
	races        = 10_000
)

// rightPlace is where a mount made at /a/data may be found: the directory that had
// this name, under whatever name it has meanwhile. A link's target is no such place.
var rightPlace = regexp.MustCompile(`^/(a|b|link)/(data|link)$|^/spare/data$`)

// TestSymlinkRace attaches ten thousand times while a process in the container
// swaps directories, links and parents as fast as it can. Each attach is in the
// right directory or refused, and nothing is ever mounted or made elsewhere.
func TestSymlinkRace(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	swapper := filepath.Join(f.c.Rootfs, "swapper")
	build := exec.Command("go", "build", "-trimpath", "-o", swapper, "./testdata/swapper")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := hostNames(t)
	f.c.Background("GOMAXPROCS=1 exec /swapper")
	f.r.MountPath = "/a/data"
	volume, err := attach.VolumeOf(f.r)
	if err != nil {
		t.Fatal(err)
	}
	n := races
	if text := os.Getenv(raceVariable); text != "" {
		if n, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	places := map[string]int{}
	var refused, again int
	for i := range n {
		err := f.a.Attach(context.Background(), f.r)
		switch {
		case err == nil:
			places[f.place(volume)]++
		case errors.Is(err, blockdev.ErrInvalid), errors.Is(err, blockdev.ErrBusy):
			refused++
		default:
			t.Fatal(err)
		}
		for tries := 0; f.a.Detach(context.Background(), f.r) != nil; tries++ {
			if again++; tries > 10_000 {
				t.Fatal(f.a.Detach(context.Background(), f.r))
			}
		}
		if i%100 == 0 || i == n-1 {
			f.onlyOnStage(volume)
		}
	}
	t.Logf("%d attaches in %v: %v, %d refused, detached again %d times", n, time.Since(begin), places, refused, again)
	for p := range places {
		if !rightPlace.MatchString(p) {
			t.Errorf("mounted at %s", p)
		}
	}
	if len(places) == 0 || refused == 0 {
		t.Error("nobody raced")
	}
	if after := hostNames(t); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("names on the host: %v, before %v", after, before)
	}
	for _, dir := range []string{"target", "etc"} { // where links lead: nothing is made there
		names, err := os.ReadDir(filepath.Join(f.c.Rootfs, dir))
		if err != nil || len(names) > 0 {
			t.Errorf("in the container's /%s: %v, %v", dir, names, err)
		}
	}
}

// place finds the one mount of the volume in the container.
func (f *fixture) place(volume attach.Volume) string {
	f.Helper()
	table, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", f.c.Pid))
	if err != nil {
		f.Fatal(err)
	}
	defer table.Close()
	all, err := attach.ReadMounts(table)
	if err != nil {
		f.Fatal(err)
	}
	found := volume.Among(all)
	if len(found) != 1 {
		f.Fatalf("the container has the volume at %+v", found)
	}
	return found[0].Path
}

// onlyOnStage checks that this host has the volume mounted on the stage and nowhere else.
func (f *fixture) onlyOnStage(volume attach.Volume) {
	f.Helper()
	all, err := attach.Mounts()
	if err != nil {
		f.Fatal(err)
	}
	if found := volume.Among(all); len(found) != 1 || found[0].Path != f.r.Mounted {
		f.Fatalf("the host has the volume at %+v", found)
	}
}

// hostNames tells what there is on the host where the container's links lead.
func hostNames(t *testing.T) []string {
	t.Helper()
	var names []string
	for _, dir := range []string{"/", "/etc"} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, dir+e.Name())
		}
	}
	return names
}

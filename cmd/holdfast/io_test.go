package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/api/client"
)

// TestReportsGoTo: a bench is told before it begins that its reports have no place,
// and leaves nothing where they have one.
func TestReportsGoTo(t *testing.T) {
	dir := t.TempDir()
	if err := reportsGoTo(dir); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
	if err := reportsGoTo(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func TestRates(t *testing.T) {
	at := time.Unix(1000, 0)
	look := func(seconds int, volumes ...client.VolumeIO) ioTaken {
		taken := ioTaken{at.Add(time.Duration(seconds) * time.Second), map[string]client.VolumeIO{}}
		for _, v := range volumes {
			taken.volumes[v.Name] = v
		}
		return taken
	}
	direct := func(name string, reads int64) client.VolumeIO {
		return client.VolumeIO{Name: name, Counters: &client.IOCounters{Since: at, Reads: reads, ReadBytes: reads * 4096}}
	}
	worker := func(seconds, throttled, flushed float64) client.VolumeIO {
		v := direct("served", int64(seconds*1000))
		v.Worker = &client.Worker{Since: at, Kind: "nbd",
			Requests:  map[string]client.Served{"read": {Seconds: seconds, P99: 250}},
			Waiting:   map[string]client.WaitingOn{"throttle": {Seconds: throttled}, "flush": {Seconds: flushed}},
			Hydration: &client.WorkerHydration{Size: 100, Held: 40}}
		return v
	}
	reopened := direct("reopened", 5)
	reopened.Counters.Since = at.Add(time.Second)
	lines := ratesOf(look(0, direct("a", 10), direct("reopened", 100), direct("gone", 1), worker(1, 1, 1)),
		look(2, direct("a", 30), reopened, direct("new", 1), worker(5, 4, 2)))
	if len(lines) != 3 {
		t.Fatalf("%+v", lines)
	}
	if l := lines[0]; l.Volume != "served" || l.Path != "nbd" || l.Reads != 2000 || l.Busy != 2 || l.Waits != "throttle" || l.Absent != 60 || l.ReadP99 != 250 {
		t.Errorf("%+v", l)
	}
	if l := lines[1]; l.Volume != "a" || l.Path != "direct" || l.Reads != 10 || l.ReadBytes != 40960 || l.Busy != -1 || l.Waits != "" {
		t.Errorf("%+v", l)
	}
	if l := lines[2]; l.Volume != "reopened" || l.Reads != 0 {
		t.Errorf("numbers of another opening were compared: %+v", l)
	}
}

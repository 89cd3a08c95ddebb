package lvm

import (
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/vmtest"
)

// The tests run in a guest: this host has no device mapper.
func TestMain(m *testing.M) {
	os.Exit(vmtest.MainWith(m, vmtest.Options{Disks: []int64{16 << 30, 4 << 30, 4 << 30}}, blockd))
}

// blockd is the program of workers.
const blockd = "holdfast/cmd/holdfast-blockd"

func sh(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// group makes the volume group of all tests once.
func group(t testing.TB) string {
	t.Helper()
	sh(t, "vgs vg >/dev/null 2>&1 || vgcreate -qq -s 1m vg "+vmtest.Disks()[0])
	return "vg"
}

// place is a thin pool, and the process that uses it now.
type place struct {
	name string
	o    Options
	pool *Pool
}

var pools int

// newPlace makes a thin pool; the test's end takes it away with all that is in it.
func newPlace(t *testing.T, size string) *place {
	t.Helper()
	pools++
	p := &place{name: group(t) + "/pool" + string(rune('a'+pools/26)) + string(rune('a'+pools%26))}
	sh(t, "lvcreate -qq -y -L "+size+" --zero y -T "+p.name)
	t.Cleanup(func() {
		if p.pool != nil {
			p.pool.Shutdown()
		}
		sh(t, "lvremove -qq -ff -y "+p.name)
	})
	return p
}

// shared is the pool of the tests that need no other: to make one takes seconds.
var shared *place

// sharedPlace empties the shared pool.
func sharedPlace(t *testing.T) *place {
	t.Helper()
	if shared == nil {
		pools++
		shared = &place{name: group(t) + "/shared"}
		sh(t, "lvcreate -qq -y -L 96m --zero y -T "+shared.name)
	}
	p := shared
	p.o = Options{}
	t.Cleanup(func() {
		if p.pool != nil {
			p.pool.Shutdown()
			p.pool = nil
		}
		sh(t, "lvremove -qq -ff -y --select 'pool_lv=shared && lv_name!="+metaPrefix+"shared' vg")
	})
	return p
}

// open gives the pool to a new process.
func (p *place) open(t *testing.T) *Pool {
	t.Helper()
	pool, err := p.tryOpen(t)
	if err != nil {
		t.Fatal(err)
	}
	return pool
}

func (p *place) tryOpen(t *testing.T) (*Pool, error) {
	t.Helper()
	if p.pool != nil {
		p.pool.Shutdown()
		p.pool = nil
	}
	o := p.o
	o.Host, o.MetaBytes, o.Log = "test", leastMeta, slog.New(slog.NewTextHandler(t.Output(), nil))
	pool, err := Open(t.Context(), p.name, o)
	if err == nil {
		p.pool = pool
	}
	return pool, err
}

func TestBackend(t *testing.T) {
	blockdevtest.TestBackend(t, func(t *testing.T) blockdevtest.Place {
		p := sharedPlace(t)
		return blockdevtest.Place{
			Open:   func(t *testing.T) blockdev.Backend { return p.open(t) },
			Damage: func(t *testing.T, id blockdev.ID) { damage(t, p.pool, id) },
			Kinds:  []blockdev.Kind{blockdev.Block}, Grain: 1 << 20, Slow: true, Clones: true, Snapshots: true,
		}
	})
}

func damage(t *testing.T, p *Pool, id blockdev.ID) {
	t.Helper()
	f, err := p.meta.root.OpenFile(describedName(id), os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("damage"), 30)
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

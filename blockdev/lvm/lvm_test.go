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
	os.Exit(vmtest.Main(m, vmtest.Options{Disks: []int64{16 << 30, 4 << 30}}))
}

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
		_, thin, _ := strings.Cut(p.name, "/")
		sh(t, "lvs --noheadings -o lv_name -S 'pool_lv="+thin+" && lv_active=active' vg | while read v; do lvchange -qq -an vg/$v; done; lvremove -qq -ff -y "+p.name)
	})
	return p
}

func (p *place) open(t *testing.T) *Pool {
	t.Helper()
	if p.pool != nil {
		p.pool.Shutdown()
	}
	pool, err := Open(t.Context(), p.name, Options{Host: "test", MetaBytes: 8 << 20, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	p.pool = pool
	return pool
}

func TestBackend(t *testing.T) {
	blockdevtest.TestBackend(t, func(t *testing.T) blockdevtest.Place {
		p := newPlace(t, "64m")
		return blockdevtest.Place{
			Open:   func(t *testing.T) blockdev.Backend { return p.open(t) },
			Damage: func(t *testing.T, id blockdev.ID) { damage(t, p.pool, id) },
			Kinds:  []blockdev.Kind{blockdev.Block}, Grain: 1 << 20, Slow: true, Clones: true,
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

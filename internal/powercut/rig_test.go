package powercut

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

const rigSize = 320 << 20

// ack is what a writer has been told is there, from a moment on.
type ack struct {
	name string
	at   Moment
}

func content(name string) []byte { return []byte(strings.Repeat(name+"\n", 700)) }

func write(t *testing.T, name string, sync bool) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(content(filepath.Base(name))); err != nil {
		t.Fatal(err)
	}
	if sync {
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		syncDir(t, filepath.Dir(name))
	}
}

func syncDir(t *testing.T, dir string) {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
}

func lost(dir string, acks []ack, at Moment) (missing []string) {
	for _, a := range acks {
		if a.at > at {
			continue
		}
		got, err := os.ReadFile(filepath.Join(dir, a.name))
		if err != nil || !bytes.Equal(got, content(filepath.Base(a.name))) {
			missing = append(missing, fmt.Sprintf("%s (%d bytes, %v)", a.name, len(got), err))
		}
	}
	return missing
}

// TestRigSeesAMissingFsync proves the rig itself: of two writers that do the
// same, the one that fsyncs loses nothing at any cut, the one that does not
// loses something.
func TestRigSeesAMissingFsync(t *testing.T) {
	blockdevtest.LeakCheck(t)
	r := Start(t, rigSize)
	for _, d := range []string{"careful", "careless"} {
		if err := os.Mkdir(filepath.Join(r.Dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	syncDir(t, r.Dir)
	begin := r.Mark()
	var careful, careless []ack
	for i := range 60 {
		a := ack{name: fmt.Sprintf("careless/%03d", i)}
		write(t, filepath.Join(r.Dir, a.name), false)
		a.at = r.Mark()
		careless = append(careless, a)

		a = ack{name: fmt.Sprintf("careful/%03d", i)}
		write(t, filepath.Join(r.Dir, a.name), true)
		a.at = r.Mark()
		careful = append(careful, a)
	}
	r.Stop(t)

	var forgotten int
	moments := r.Moments(begin, r.Mark(), 6, 1)
	for i := 5; i < len(careful); i += 10 {
		moments = append(moments, careful[i].at)
	}
	for i, at := range moments {
		for _, seed := range []uint64{0, uint64(i) + 1} {
			dir := r.Rebuild(t, at, seed)
			if missing := lost(dir, careful, at); len(missing) > 0 {
				t.Errorf("cut at %d, seed %d: fsynced files are lost: %v", at, seed, missing)
			}
			forgotten += len(lost(dir, careless, at))
			r.Discard(t, dir)
		}
	}
	if forgotten == 0 {
		t.Error("no cut lost a file that was never fsynced: this rig cannot see a missing fsync")
	}
	t.Logf("%d moments, twice each: %d files without fsync were lost", len(moments), forgotten)
}

// TestReplayIsTheDisk: the whole log, replayed onto the pristine filesystem,
// gives bit for bit the disk that was written to, discards included.
func TestReplayIsTheDisk(t *testing.T) {
	blockdevtest.LeakCheck(t)
	r := Start(t, rigSize)
	for i := range 20 {
		name := filepath.Join(r.Dir, fmt.Sprintf("f%02d", i))
		write(t, name, i%2 == 0)
		if i%3 == 0 {
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := command("fstrim", r.Dir); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(r.Dir, "last"), false)
	r.Stop(t)

	var discards int
	for _, e := range r.entries {
		if e.discard() {
			discards++
		}
	}
	if discards == 0 {
		t.Error("the log has no discard")
	}
	if err := r.advance(len(r.entries)); err != nil {
		t.Fatal(err)
	}
	if err := command("cmp", r.path("disk"), r.path("base")); err != nil {
		t.Error(err)
	}
}

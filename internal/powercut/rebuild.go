package powercut

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"holdfast/internal/sys"
)

// Moments picks n moments between from and to, each within its own n-th part of
// what was logged: the same ones for one seed. The rig must be stopped.
func (r *Rig) Moments(from, to Moment, n int, seed uint64) []Moment {
	part := r.entries[before(r.entries, from):before(r.entries, to)]
	random := rand.New(rand.NewPCG(seed, uint64(n)))
	var moments []Moment
	for i := range n {
		low, high := len(part)*i/n, len(part)*(i+1)/n
		if low < high {
			moments = append(moments, Moment(part[low+random.IntN(high-low)].end()))
		}
	}
	return moments
}

// Rebuild makes the disk as it was at a moment, mounts it and gives the
// directory. With a seed other than 0 an arbitrary subset of the writes since
// the last flush is missing: the same one for one seed. The rig must be stopped.
// Moments that go up are cheaper than those that go back. It is unmounted when
// the test ends, or before by Discard.
func (r *Rig) Rebuild(t testing.TB, at Moment, seed uint64) (dir string) {
	t.Helper()
	if r.device != "" || r.entries == nil {
		t.Fatal("power-cut rig: Rebuild before Stop")
	}
	r.rebuilt++
	name := fmt.Sprintf("cut%d", r.rebuilt)
	dir = r.path(name)
	t.Cleanup(func() { r.Discard(t, dir) })
	if err := r.rebuild(r.path(name+".disk"), dir, at, seed); err != nil {
		t.Fatalf("power-cut rig: rebuild at %d with seed %d: %v", at, seed, err)
	}
	return dir
}

// Discard unmounts a rebuilt disk, and what is mounted on it, and removes it.
func (r *Rig) Discard(t testing.TB, dir string) {
	t.Helper()
	image := dir + ".disk"
	if err := takeDown(dir, r.cuts[dir]); err != nil {
		t.Error(err)
	}
	delete(r.cuts, dir)
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
	if err := os.Remove(image); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func (r *Rig) rebuild(image, dir string, at Moment, seed uint64) error {
	n := before(r.entries, at)
	sure := settled(r.entries, n)
	if err := r.advance(sure); err != nil {
		return err
	}
	if err := command("cp", "--sparse=always", r.base.file.Name(), image); err != nil {
		return err
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = replay(imageFile{f}, r.log, r.entries[sure:n], dropper(seed))
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if r.cuts[dir], err = loopOver(image); err != nil {
		return err
	}
	return r.mountAt(r.cuts[dir], dir)
}

// base is the disk with the first entries of the log done: what many moments
// have in common.
type base struct {
	file *os.File
	done int
}

// advance brings the base to exactly n entries.
func (r *Rig) advance(n int) error {
	if r.base == nil || r.base.done > n {
		if err := r.newBase(); err != nil {
			return err
		}
	}
	b := r.base
	if err := replay(imageFile{b.file}, r.log, r.entries[b.done:n], dropper(0)); err != nil {
		return err
	}
	b.done = n
	return nil
}

func (r *Rig) newBase() error {
	if r.base != nil {
		_ = r.base.file.Close() // it is overwritten next
		r.base = nil
	}
	if err := command("cp", "--sparse=always", r.path("pristine"), r.path("base")); err != nil {
		return err
	}
	f, err := os.OpenFile(r.path("base"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	r.base = &base{file: f}
	return nil
}

// imageFile is a disk in a sparse file.
type imageFile struct{ *os.File }

func (f imageFile) Zero(offset, length int64) error {
	return sys.PunchHole(f.File, offset, length)
}

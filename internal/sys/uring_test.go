package sys

import (
	"errors"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// TestUringOnOlderKernels: a ring does all that it has to whichever setup the kernel
// takes; the first one here no kernel takes.
func TestUringOnOlderKernels(t *testing.T) {
	const refused = 1 << 31
	for _, setup := range uringSetups {
		t.Run("", func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			r, err := newUring(8, []uint32{refused, setup})
			if err != nil {
				t.Fatal(err)
			}
			useUring(t, r)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := newUring(8, []uint32{refused}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a kernel that takes nothing: %v", err)
	}
	if _, err := newUring(1<<30, uringSetups); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a ring of 2^30: %v", err)
	}
}

// useUring has a ring complete what does nothing, fail what is nonsense, wait for a
// time and for an eventfd, and go round several times.
func useUring(t *testing.T, r *Uring) {
	t.Helper()
	const opPollAdd, opNonsense = 6, 255
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	wake, err := NewEventFD()
	must(err)
	defer wake.Close()
	*r.Next() = UringEntry{Opcode: opPollAdd, FD: int32(wake.Fd()), Len: 1, OpFlags: 1, UserData: 1000}
	must(r.EnterWithin(1, time.Millisecond))
	if e, ok := r.Event(); ok {
		t.Errorf("out of nowhere: %+v", e)
	}
	for round := range uint64(10) {
		count := uint64(0)
		for e := r.Next(); e != nil; e = r.Next() {
			e.UserData = count
			if count++; count == 3 {
				e.Opcode = opNonsense
			}
		}
		if count != 8 {
			t.Fatalf("%d entries of 8", count)
		}
		if round == 5 {
			must(SignalEvent(int(wake.Fd())))
			count++
		}
		for seen := uint64(0); seen < count; {
			must(r.Enter(1))
			for e, ok := r.Event(); ok; e, ok = r.Event() {
				seen++
				switch {
				case e.UserData == 1000:
					if round != 5 || e.Res&1 == 0 {
						t.Errorf("woken in round %d: %+v", round, e)
					}
				case e.UserData > 7 || (e.UserData == 2) != (e.Res == -int32(syscall.EINVAL)):
					t.Errorf("round %d: %+v", round, e)
				}
			}
		}
	}
}

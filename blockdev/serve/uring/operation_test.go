package uring_test

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/uring"
	"holdfast/internal/sys"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ring makes one for the test, which stays on its thread.
func ring(t *testing.T, entries uint32) *sys.Uring {
	t.Helper()
	runtime.LockOSThread()
	r, err := sys.NewUring(entries)
	must(t, err)
	t.Cleanup(func() {
		must(t, r.Close())
		runtime.UnlockOSThread()
	})
	return r
}

// results waits for so many completions, and gives them by their tags.
func results(t *testing.T, r *sys.Uring, count int) map[uint64]int {
	t.Helper()
	got := map[uint64]int{}
	for len(got) < count {
		must(t, r.Enter(1))
		for e, ok := r.Event(); ok; e, ok = r.Event() {
			got[e.UserData] = int(e.Res)
		}
	}
	return got
}

func TestFile(t *testing.T) {
	r := ring(t, 8)
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	must(t, err)
	defer f.Close()
	fd := int(f.Fd())
	text := []byte("some text")
	uring.Write(r.Next(), fd, text, 4096, 7)
	if got := results(t, r, 1); got[7] != len(text) {
		t.Errorf("wrote %v", got)
	}
	there, past := make([]byte, 4), make([]byte, 4)
	uring.Read(r.Next(), fd, there, 4096+5, 1)
	uring.Read(r.Next(), fd, past, 1<<20, 2)
	uring.Read(r.Next(), -1, past, 0, 3)
	got := results(t, r, 3)
	if got[1] != 4 || string(there) != "text" || got[2] != 0 || got[3] != -int(syscall.EBADF) {
		t.Errorf("read %v, %q", got, there)
	}
}

// TestSocket sends in one piece and in several, and receives what is there and all.
func TestSocket(t *testing.T) {
	r := ring(t, 8)
	a, b, err := sys.SocketPair()
	must(t, err)
	defer a.Close()
	defer b.Close()
	from, to := int(a.Fd()), int(b.Fd())
	some, all := make([]byte, 100), make([]byte, 9)
	uring.Recv(r.Next(), to, some, false, 1)
	uring.Send(r.Next(), from, []byte("abc"), 2)
	if got := results(t, r, 2); got[1] != 3 || got[2] != 3 || string(some[:3]) != "abc" {
		t.Errorf("sent and received %v", got)
	}
	m := uring.NewMessage(3)
	for _, part := range []string{"one", "two", "six"} {
		m.Add([]byte(part))
	}
	if !m.Full() {
		t.Error("three pieces of three, and there is room")
	}
	uring.Recv(r.Next(), to, all, true, 3)
	uring.SendMessage(r.Next(), from, m, 4)
	if got := results(t, r, 2); got[3] != 9 || got[4] != 9 || string(all) != "onetwosix" {
		t.Errorf("sent and received %v, %q", got, all)
	}
	if m.Reset(); m.Full() {
		t.Error("an emptied message is full")
	}
	must(t, sys.ShutdownSocket(a, syscall.SHUT_RDWR))
	uring.Recv(r.Next(), to, some, false, 5)
	uring.Send(r.Next(), to, []byte("x"), 6)
	if got := results(t, r, 2); got[5] != 0 || got[6] != -int(syscall.EPIPE) {
		t.Errorf("from and to a socket that is shut: %v", got)
	}
}

// TestSendsAllOfMuch: more than the socket holds goes out in one operation.
func TestSendsAllOfMuch(t *testing.T) {
	r := ring(t, 4)
	a, b, err := sys.SocketPair()
	must(t, err)
	defer a.Close()
	defer b.Close()
	much := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
	got := make([]byte, len(much))
	uring.Send(r.Next(), int(a.Fd()), much, 1)
	uring.Recv(r.Next(), int(b.Fd()), got, true, 2)
	if n := results(t, r, 2); n[1] != len(much) || n[2] != len(much) || !bytes.Equal(got, much) {
		t.Errorf("of %d bytes: %v", len(much), n)
	}
}

// TestSendsAtOnce: what is sent whole has no completion; what the socket has no room
// for completes with what was sent, and with an error when that is nothing.
func TestSendsAtOnce(t *testing.T) {
	r := ring(t, 4)
	if !r.Quiet() {
		t.Skip("this kernel has a completion for everything")
	}
	a, b, err := sys.SocketPair()
	must(t, err)
	defer a.Close()
	defer b.Close()
	send := func(b []byte) (res int, completed bool) {
		t.Helper()
		e := r.Next()
		uring.Send(e, int(a.Fd()), b, 1)
		uring.AtOnce(e)
		must(t, r.Enter(0))
		if !r.Submitted() {
			t.Fatal("an entry is not submitted")
		}
		event, completed := r.Event()
		return int(event.Res), completed
	}
	if _, completed := send([]byte("some")); completed {
		t.Error("a send that went through has a completion")
	}
	much := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
	part, completed := send(much)
	if !completed || part <= 0 || part >= len(much) {
		t.Fatalf("%d of %d bytes were sent, completion: %t", part, len(much), completed)
	}
	if res, completed := send(much); !completed || res != -int(syscall.EAGAIN) {
		t.Errorf("into a full socket: %d, completion: %t", res, completed)
	}
	got := make([]byte, 4+part)
	uring.Recv(r.Next(), int(b.Fd()), got, true, 2)
	if n := results(t, r, 1); n[2] != len(got) || string(got[:4]) != "some" || !bytes.Equal(got[4:], much[:part]) {
		t.Errorf("of %d bytes: %v", len(got), n)
	}
}

func TestWaits(t *testing.T) {
	r := ring(t, 4)
	var timer uring.Timer
	began := time.Now()
	uring.Timeout(r.Next(), &timer, int64(20*time.Millisecond), 9)
	if got := results(t, r, 1); got[9] != -int(syscall.ETIME) || time.Since(began) < 20*time.Millisecond {
		t.Errorf("a timeout of 20 ms: %v after %v", got, time.Since(began))
	}
	must(t, r.EnterWithin(3, time.Millisecond)) // nothing comes, and it returns
	if e, ok := r.Event(); ok {
		t.Errorf("out of nowhere: %+v", e)
	}
}

// TestFullRing: there are as many entries as were asked for, until they are
// submitted.
func TestFullRing(t *testing.T) {
	r := ring(t, 4)
	var timers [8]uring.Timer
	for round := range 2 {
		for n := range 4 {
			e := r.Next()
			if e == nil {
				t.Fatalf("%d entries of 4", n)
			}
			uring.Timeout(e, &timers[4*round+n], 1, uint64(n))
		}
		if r.Next() != nil {
			t.Fatal("a fifth entry of 4")
		}
		results(t, r, 4)
	}
}

// TestCanceled: what the kernel has nobody for is not performed, and says so.
func TestCanceled(t *testing.T) {
	blockdevtest.WithoutThreads(t, func(t *testing.T) {
		r := ring(t, 8)
		f, err := os.Create(filepath.Join(t.TempDir(), "file"))
		must(t, err)
		defer f.Close()
		uring.SyncData(r.Next(), int(f.Fd()), 1)
		if got := results(t, r, 1); got[1] != -int(syscall.ECANCELED) {
			t.Errorf("%v", got)
		}
	})
}

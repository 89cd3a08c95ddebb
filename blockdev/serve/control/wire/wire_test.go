package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func pair(t testing.TB) (a, b Conn) {
	t.Helper()
	fa, fb, err := sys.SocketPacketPair()
	must(t, err)
	conn := func(f *os.File) Conn {
		c, err := net.FileConn(f)
		must(t, errors.Join(err, f.Close()))
		t.Cleanup(func() { c.Close() })
		return Conn{c.(*net.UnixConn)}
	}
	return conn(fa), conn(fb)
}

func volume() *Volume {
	return &Volume{ID: "vol-06c8qk4g1h6s9tj2m0a4n7v5b0", Kind: blockdev.NBD, Size: 4096, Layers: 2, Base: true, BaseSize: 4096, Lock: true, User: 1, Group: 1}
}

// TestFilesComeInOrder: what is handed over arrives as what it was, and the sender
// keeps its own.
func TestFilesComeInOrder(t *testing.T) {
	a, b := pair(t)
	v := volume()
	var files []*os.File
	for n := range v.Files() {
		f, err := sys.MemoryFile(fmt.Sprint(n), int64(n+1))
		must(t, err)
		defer f.Close()
		files = append(files, f)
	}
	must(t, a.Call(&Request{Op: Open, Volume: v}, files...))
	r, got, err := b.Request()
	must(t, err)
	defer CloseAll(got)
	if r.Op != Open || r.Volume.Layers != 2 || len(got) != len(files) {
		t.Fatalf("%+v with %d files", r, len(got))
	}
	for n, f := range got {
		st, err := f.Stat()
		must(t, err)
		if st.Size() != int64(n+1) {
			t.Errorf("file %d is of %d bytes", n, st.Size())
		}
	}
	must(t, a.Close())
	if _, _, err := b.Request(); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
}

func TestErrorsKeepTheirKind(t *testing.T) {
	for _, sentinel := range kinds {
		e := NewError(fmt.Errorf("something: %w", sentinel))
		b, err := json.Marshal(e)
		must(t, err)
		var back Error
		must(t, json.Unmarshal(b, &back))
		if !errors.Is(back.Err(), sentinel) || !strings.HasPrefix(back.Err().Error(), "something: ") {
			t.Errorf("%v became %v", sentinel, back.Err())
		}
	}
	if err := NewError(fmt.Errorf("%w: %w", blockdev.ErrNoSpace, blockdev.ErrFailed)).Err(); !errors.Is(err, blockdev.ErrFailed) {
		t.Errorf("a failed flush became %v", err)
	}
	if NewError(nil).Err() != nil {
		t.Error("no error became one")
	}
}

func TestWhatMakesNoSenseIsNotSent(t *testing.T) {
	a, _ := pair(t)
	for _, change := range []func(*Volume){
		func(v *Volume) { v.ID = "x" },
		func(v *Volume) { v.Kind = blockdev.File },
		func(v *Volume) { v.Size = 0 },
		func(v *Volume) { v.Layers = 0 },
		func(v *Volume) { v.Layers = MaxLayers + 1 },
		func(v *Volume) { v.Flat = true },
		func(v *Volume) { v.BaseSize = 0 },
		func(v *Volume) { v.Remote, v.URL = true, "http://x" },
		func(v *Volume) { v.URL = "http://x" },
		func(v *Volume) { v.Trace = make([]int64, MaxTrace+1) },
	} {
		v := volume()
		change(v)
		if err := a.Call(&Request{Op: Open, Volume: v}, make([]*os.File, v.Files())...); !errors.Is(err, ErrProtocol) {
			t.Errorf("%+v: %v", v, err)
		}
	}
}

// FuzzRequest: whatever comes is refused or makes sense, and what makes sense says the
// same when it is said again.
func FuzzRequest(f *testing.F) {
	for _, r := range []Request{
		{Version: 1, Op: Open, Volume: volume()}, {Version: 1, Op: Status}, {Version: 1, Op: Seal, Name: "top"},
		{Version: 1, Op: Throttle, Limits: &blockdev.Limits{ReadIOPS: 1}}, {Version: 1, Op: Recorded, Error: &Error{Kind: "busy"}},
	} {
		b, err := json.Marshal(r)
		must(f, err)
		f.Add(b, r.Files())
	}
	f.Add([]byte(`{"version":1,"op":"grow","size":-1}`), 0)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		var r Request
		if err := decode(b, &r); err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		if err := r.check(files); err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		if n := r.Files(); n < 0 || n > MaxFiles {
			t.Fatalf("%d files", n)
		}
		again, err := json.Marshal(&r)
		must(t, err)
		var same Request
		must(t, decode(again, &same))
		must(t, same.check(files))
	})
}

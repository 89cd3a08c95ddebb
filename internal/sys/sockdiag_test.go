package sys_test

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"holdfast/internal/sys"
)

// TestSocketPeers: who is connected to a socket file is told, by the inode of its own
// end, among others who are connected elsewhere.
func TestSocketPeers(t *testing.T) {
	dir := t.TempDir()
	listen := func(name string) (string, net.Listener) {
		path := filepath.Join(dir, name)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return path, l
	}
	connect := func(path string, l net.Listener) (inode uint64, hangUp func()) {
		near, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		f, err := near.(*net.UnixConn).File()
		if err != nil {
			t.Fatal(err)
		}
		place, err := sys.PlaceOf(f)
		if err != nil {
			t.Fatal(err)
		}
		hangUp = func() { f.Close(); near.Close(); far.Close() }
		t.Cleanup(hangUp)
		return place.Inode, hangUp
	}
	one, l1 := listen("one")
	two, l2 := listen("two")
	first, hangUp := connect(one, l1)
	second, _ := connect(one, l1)
	other, _ := connect(two, l2)

	if err := os.Symlink(one, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	expect := func(path string, want ...uint64) {
		t.Helper()
		at, err := sys.PlaceBehind(path)
		if err != nil || !at.IsSocket() {
			t.Fatalf("%+v, %v", at, err)
		}
		got, err := sys.SocketPeers(at)
		if err != nil || len(got) != len(want) {
			t.Errorf("%s: %v, %v; want %v", path, got, err, want)
		}
		for _, inode := range want {
			if !got[inode] {
				t.Errorf("%s: %v lacks %d", path, got, inode)
			}
		}
	}
	expect(one, first, second)
	expect(filepath.Join(dir, "link"), first, second)
	expect(two, other)
	hangUp()
	expect(one, second)
}

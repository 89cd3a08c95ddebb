package main_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/overlay"
)

// layer makes an empty one of the volume's size.
func layer(t testing.TB) control.Layer {
	t.Helper()
	dir := t.TempDir()
	create := func(name string, flags int) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, filepath.Base(filepath.Dir(dir))+name), os.O_RDWR|os.O_CREATE|flags, 0o600)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	l := control.Layer{Data: create("data", syscall.O_DIRECT), Map: create("map", 0)}
	must(t, overlay.Create(overlay.Files{Data: overlay.OSFile{File: l.Data}, Map: overlay.OSFile{File: l.Map}}, size))
	return l
}

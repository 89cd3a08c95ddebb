package sparse

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

func TestSharedBytes(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.XFS)
	p, err := Open(t.Context(), blockdevtest.ReflinkDir(t), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Shutdown)
	src, dst := blockdevtest.NewID("src"), blockdevtest.NewID("vol")
	const size = 1 << 20
	if err := p.Create(t.Context(), src, size); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(p.draft(src)+"/"+imageFile, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(bytes.Repeat([]byte{1}, size))
	if err := errors.Join(err, f.Close(), p.Publish(t.Context(), src, nil)); err != nil {
		t.Fatal(err)
	}
	if alone, err := p.SharedBytes(t.Context()); err != nil || alone != 0 {
		t.Fatalf("one image shares %d bytes, %v", alone, err)
	}
	if err := errors.Join(p.Clone(t.Context(), dst, src, size), p.Publish(t.Context(), dst, nil)); err != nil {
		t.Fatal(err)
	}
	p.shared.at = p.shared.at.Add(-sharedAge)
	if both, err := p.SharedBytes(t.Context()); err != nil || both != 2*size {
		t.Fatalf("two images share %d bytes, %v", both, err)
	}
}

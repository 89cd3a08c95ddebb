package templates_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
	"holdfast/templates"
)

// TestConvertedSourcesLieInOrder: a clone costs with the pieces that its source's
// image is in, and thousands of files must not mean thousands of pieces.
func TestConvertedSourcesLieInOrder(t *testing.T) {
	blockdevtest.LeakCheck(t)
	dir := blockdevtest.ReflinkDir(t, blockdevtest.Size(2<<30))
	r := newRig(t, dir, nil)
	r.put("many")
	var entries []entry
	for i := range 3000 {
		entries = append(entries, file(fmt.Sprintf("d%02d/f%04d", i%40, i), strings.Repeat(fmt.Sprintf("%08d", i), 512+i%2048)))
	}
	v := r.push("many", pack(t, entries...))
	for _, fs := range []filesystem.Type{filesystem.XFS, filesystem.Btrfs} {
		id, release := r.source(templates.SourceSpec{Filesystem: fs, Size: 512 << 20, Revision: v.ID})
		f, err := imageOf(dir, string(id))
		if err != nil {
			t.Fatal(err)
		}
		mapped, err := sys.MapFile(f, 4096)
		if err != nil || f.Close() != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d pieces for %d MiB", fs, mapped.Extents, mapped.Allocated>>20)
		if mapped.Extents > 200 || mapped.Allocated == 0 {
			t.Errorf("%s: 3000 files lie in %d pieces", fs, mapped.Extents)
		}
		release()
	}
}

// imageOf opens a published image below a pool's directory.
func imageOf(dir, id string) (*os.File, error) {
	found, err := filepath.Glob(filepath.Join(dir, "*", "images", id, "image"))
	if err == nil && len(found) == 0 {
		found, err = filepath.Glob(filepath.Join(dir, "images", id, "image"))
	}
	if err != nil || len(found) != 1 {
		return nil, fmt.Errorf("image %s: %v, %w", id, found, errors.Join(err, os.ErrNotExist))
	}
	return os.Open(found[0])
}

package filesystem

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// TestIdentifyXFSFindsTheHeadOfItsLog writes a small log several times around
// and identifies at many positions of its head.
func TestIdentifyXFSFindsTheHeadOfItsLog(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.XFS)
	blockdevtest.LeakCheck(t)
	x := NewTools()
	path := blank(t, 300*MiB)
	command(t, "mkfs.xfs", "-q", "--unsupported", "-s", "size=4096", "-l", "size=10m", path)
	for round := range 8 {
		before := logHead(t, path)
		uuid := fmt.Sprintf("01234567-89ab-4cde-8f01-%012x", round)
		check(t, x.Identify(t.Context(), path, XFS, uuid))
		if after := logHead(t, path); after != before {
			t.Fatalf("the log's head moved from %v to %v", before, after)
		}
		check(t, x.Check(t.Context(), path, XFS, false))
		dir, unmount := mounted(t, path, XFS)
		f, err := os.Create(filepath.Join(dir, fmt.Sprint(round)))
		check(t, err)
		for range 700 {
			_, err := f.Write([]byte("x"))
			check(t, err)
			check(t, f.Sync())
		}
		check(t, f.Close())
		unmount()
	}
	if head := logHead(t, path); head.cycle < 2 {
		t.Errorf("the log never went around: %v", head)
	}
}

type head struct {
	block int64
	cycle uint32
}

func logHead(t *testing.T, path string) head {
	t.Helper()
	s, err := readXFSSuper(path)
	check(t, err)
	log, err := s.internalLog()
	check(t, err)
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	block, err := log.find(f)
	check(t, err)
	cycle, err := log.cycle(f, 0)
	check(t, err)
	return head{block, cycle}
}

package insidetest

import (
	"os"
	"strings"
	"testing"

	"holdfast/internal/bytesize"
	"holdfast/internal/vmtest"
)

func TestMain(m *testing.M) { os.Exit(vmtest.Main(m, vmtest.Options{Disks: []int64{64 << 20}})) }

// TestInside runs in a guest, with its disk, and covers a line of another package.
func TestInside(t *testing.T) {
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil || !vmtest.Inside() || len(vmtest.Disks()) != 1 {
		t.Fatalf("inside %t, disks %v, %v", vmtest.Inside(), vmtest.Disks(), err)
	}
	t.Logf("kernel %s, %s", strings.TrimSpace(string(kernel)), bytesize.Human(64<<20))
	if os.Getenv("HOLDFAST_INSIDE") == "fail" {
		t.Error("it was told to fail")
	}
}

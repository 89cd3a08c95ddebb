package metadata

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"holdfast/blockdev/blockdevtest"
)

// The filesystem under a writer is cut off at a random moment, as by a pulled
// disk: what had not been flushed is gone. The writer must stop by itself, and
// after the recovery whatever it acknowledged is there. Unlike a kill, this
// sees a missing sync.
func TestFilesystemCutOff(t *testing.T) {
	for _, c := range []struct {
		need blockdevtest.Need
		mkfs []string
	}{
		{blockdevtest.XFS, []string{"mkfs.xfs", "-q"}},
		{blockdevtest.Ext4, []string{"mkfs.ext4", "-q"}},
	} {
		t.Run(string(c.need), func(t *testing.T) {
			blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, c.need)
			image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
			if err := os.WriteFile(image, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			truncate(t, image, 512<<20)
			command(t, append(c.mkfs, image)...)
			command(t, "mount", "-o", "loop", image, dir)
			t.Cleanup(func() { command(t, "umount", dir) })
			acknowledged := map[string]bool{}
			for round := range 6 {
				cutWriter(t, dir, 1+rand.IntN(300), acknowledged)
				command(t, "umount", dir)
				command(t, "mount", "-o", "loop", image, dir)
				checkAcknowledged(t, dir, round, acknowledged)
			}
			t.Logf("%d acknowledged", len(acknowledged))
		})
	}
}

func command(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
}

// cutWriter lets a writer acknowledge so much, cuts its filesystem off and waits
// until it has stopped.
func cutWriter(t *testing.T, dir string, after int, acknowledged map[string]bool) {
	t.Helper()
	cmd, out, stderr := startWriter(t, dir)
	defer func() { _ = cmd.Process.Kill() }() // when the test has failed
	lines := bufio.NewScanner(out)
	n := 0
	for lines.Scan() {
		acknowledged[lines.Text()] = true
		if n++; n == after {
			cutOff(t, dir)
		}
	}
	_ = cmd.Wait() // by an error of its own, or by SIGBUS: a write into a mapped file that is gone
	if n < after || !stopped(cmd.ProcessState, stderr.String()) {
		t.Fatalf("%d acknowledged, then %v\n%s", n, cmd.ProcessState, stderr.String())
	}
}

func stopped(state *os.ProcessState, stderr string) bool {
	return state.ExitCode() == 1 && strings.Contains(stderr, ErrFailed.Error()) || strings.Contains(stderr, "SIGBUS") || strings.Contains(stderr, "fault address")
}

// cutOff shuts a filesystem down without flushing its log (xfs_fs.h, ext4.h:
// the same request and flag).
func cutOff(t *testing.T, dir string) {
	t.Helper()
	const goingDown, noLogFlush = 0x8004587d, 2
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flags := uint32(noLogFlush)
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), goingDown, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		t.Fatal(fmt.Errorf("shut down %s: %w", dir, errno))
	}
}

package blockdevtest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// leakPatience is how long LeakCheck waits for the kernel to finish taking a
// device away (a loop device goes shortly after its last unmount).
const leakPatience = 30 * time.Second

// LeakCheck fails the test if at its end a loop device, a mount or an open file
// of ours is left below the test's temporary directories or dirs. Call it first:
// it then looks after all other cleanups, and before t.TempDir is removed.
func LeakCheck(t testing.TB, dirs ...string) {
	t.Helper()
	dirs = append([]string{filepath.Dir(t.TempDir())}, dirs...)
	t.Cleanup(func() {
		var err error
		for deadline := time.Now().Add(leakPatience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if err = leaks(t, dirs); err == nil {
				return
			}
		}
		t.Error(err)
	})
}

func leaks(t testing.TB, dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		loops := LoopsUnder(t, dir)
		errs = append(errs,
			leftBehind("loop devices", loops),
			leftBehind("mounts", MountsUnder(t, dir)),
			leftBehind("open files", openUnder(t, dir, loops)))
	}
	return errors.Join(errs...)
}

// MountsUnder tells the mount points below dir in this mount namespace.
func MountsUnder(t testing.TB, dir string) []string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for _, line := range strings.Split(string(table), "\n") {
		fields := strings.Fields(line)
		if len(fields) > 4 && below(unescape(fields[4]), dir) {
			points = append(points, unescape(fields[4]))
		}
	}
	return points
}

// unescape undoes what the kernel does to spaces and the like in mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

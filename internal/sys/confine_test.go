package sys

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLinkedWithC: a program that cannot do to all of its threads what it has to says how it
// is to be built.
func TestLinkedWithC(t *testing.T) {
	if err := onAllThreads("getpid", unix.SYS_GETPID, 0, 0); err != nil && !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Error(err)
	}
}

package sdktest_test

import (
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/localdaemon"
	"holdfast/internal/localdaemon/daemontest"
)

// patience bounds every wait for something that takes seconds on a quiet machine.
const patience = 2 * time.Minute

// startDaemon starts a daemon in development mode, with sandboxes.
func startDaemon(t *testing.T) *localdaemon.Daemon {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Runc)
	return daemontest.Start(t, "--sandbox-pids", "200")
}

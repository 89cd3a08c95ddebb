package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"holdfast/blockdev/sparse"
	"holdfast/internal/preflight"
)

// hostChecks are those that need no daemon.
func hostChecks(ctx context.Context, c Config) []preflight.Check {
	return append(preflight.Host(ctx), cageCheck(c), workerCheck(c), exportCheck(c), keysCheck(c), stateCheck(c))
}

// stateCheck says whether others can replace what is in the state directory, keys and
// records among it. To enter and to read it may be given to others, as for a pool whose
// images virtual machines open.
func stateCheck(c Config) preflight.Check {
	check := preflight.Check{Name: "state directory", Status: preflight.OK, Found: c.StateDir + " is not there yet"}
	info, err := os.Stat(c.StateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return check
	}
	check.Consequence = "who may write in it can replace keys, records and volumes"
	check.Fix = "chown root and chmod 700 " + c.StateDir
	if err != nil {
		check.Status, check.Found = preflight.Warn, err.Error()
		return check
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode().Perm()&0o022 != 0:
		check.Status, check.Found = preflight.Warn, fmt.Sprintf("%s has mode %#o", c.StateDir, info.Mode().Perm())
	case ok && stat.Uid != 0 && int(stat.Uid) != os.Geteuid():
		check.Status, check.Found = preflight.Warn, fmt.Sprintf("%s belongs to user %d", c.StateDir, stat.Uid)
	default:
		check.Found, check.Consequence, check.Fix = "only its owner can write in "+c.StateDir, "", ""
	}
	return check
}

// placeChecks look at the pool and the records as the last daemon has left them.
func placeChecks(c Config) []preflight.Check {
	pool, poolThere := sparse.PoolAt(c.PoolDir)
	records, recordsThere := sparse.MetadataAt(c.StateDir)
	if poolThere && recordsThere {
		return preflight.Place(c.StateDir, pool, records)
	}
	return []preflight.Check{{Name: "pool-space", Status: preflight.OK, Found: "not known before a daemon has mounted the pool and the records"}}
}

// keysCheck says whether others can read private keys that the operator has set. The
// daemon's own secrets are refused then (secret); a key is somebody else's file, and
// one that is readable serves as well as before.
func keysCheck(c Config) preflight.Check {
	check := preflight.Check{Name: "private keys", Status: preflight.OK, Found: "none are set"}
	for _, key := range []struct{ setting, path string }{{"tls_key", c.TLSKey}, {"export_key", c.ExportKey}} {
		if key.path == "" {
			continue
		}
		check.Found = "only their owners can read them"
		info, err := os.Stat(key.path)
		if err != nil || info.Mode().Perm()&0o077 == 0 { // that it is not there shows where it is used
			continue
		}
		check.Status, check.Found = preflight.Warn, fmt.Sprintf("%s: %s has mode %#o", key.setting, key.path, info.Mode().Perm())
		check.Consequence = "whoever can read it can pretend to be this host"
		check.Fix = "chmod 600 " + key.path + ", and have a new key and certificate if somebody may have read it"
		return check
	}
	return check
}

// Doctor prints what this host has and lacks, without a daemon and changing
// nothing. ErrHost when the main job cannot be done.
func Doctor(ctx context.Context, c Config, out io.Writer) error {
	checks := hostChecks(ctx, c)
	if _, err := os.Stat(c.StateDir); err == nil {
		checks = append(checks, placeChecks(c)...)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, c := range checks {
		fmt.Fprintf(out, "%-5s %-18s %s\n", c.Status, c.Name, c.Found)
		for _, line := range []string{c.Consequence, c.Fix} {
			if line != "" {
				fmt.Fprintf(out, "%24s→ %s\n", "", line)
			}
		}
	}
	if failed := preflight.Failed(checks); len(failed) > 0 {
		return fmt.Errorf("%w: %s", ErrHost, failed[0].Name)
	}
	return nil
}

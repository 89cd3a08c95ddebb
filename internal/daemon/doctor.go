package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"holdfast/internal/preflight"
)

// Doctor prints what this host has and lacks, without a daemon and changing
// nothing. ErrHost when the main job cannot be done.
func Doctor(ctx context.Context, c Config, out io.Writer) error {
	checks := append(preflight.Host(ctx), cageCheck(c), workerCheck(c), exportCheck(c))
	if _, err := os.Stat(c.StateDir); err == nil {
		l := layout{c.StateDir}
		checks = append(checks, preflight.Place(c.StateDir, c.PoolDir, l.metadata())...)
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

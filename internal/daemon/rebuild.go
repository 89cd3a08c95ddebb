package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"holdfast/metadata"
)

// Rebuild makes new records from what the images and the side log say of
// themselves. The old store is moved aside and kept. With a backup it begins from
// that, for what no image tells (older events, Idempotency-Keys); where they
// differ, the images and the side log are right. It needs the state directory for
// itself: the daemon must not run.
func Rebuild(ctx context.Context, c Config, backup string, out, errOut io.Writer) (err error) {
	log, err := newLog(c, errOut)
	if err != nil {
		return Usage(err)
	}
	n, err := claim(c, log, "rebuild")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	n.rebuilding, n.restoreFrom = true, backup
	if err := n.open(ctx); err != nil {
		return err
	}
	report, err := n.engine.ReconcileReport(ctx)
	if err != nil {
		return err
	}
	for _, old := range n.kept {
		fmt.Fprintln(out, "kept:", old)
	}
	fmt.Fprintf(out, "volumes: %d (%d restored from their own descriptions)\n", report.Volumes, report.Adopted)
	fmt.Fprintf(out, "finished: %d interrupted creates and deletes\n", report.Finished)
	fmt.Fprintf(out, "discarded: %d drafts of creates that were never acknowledged\n", report.Discarded)
	if err := n.printOthers(out); err != nil {
		return err
	}
	return n.printQuarantine(ctx, out)
}

// printOthers counts what the side log and the template images gave back.
func (n *node) printOthers(out io.Writer) error {
	workspaces, err := n.auth.Workspaces()
	if err != nil {
		return err
	}
	templates, versions := 0, 0
	for _, w := range workspaces {
		all, err := n.library.List(w.Name)
		if err != nil {
			return err
		}
		templates += len(all)
		for _, t := range all {
			versions += len(t.Revisions)
		}
	}
	keys, err := n.auth.Keys("")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "templates: %d with %d versions\nworkspaces: %d\nkeys: %d\n", templates, versions, len(workspaces), len(keys))
	return err
}

// moveStoreAside renames the store and its floor; absent ones are fine.
func (n *node) moveStoreAside(now time.Time) (kept []string, err error) {
	suffix := ".before-rebuild-" + now.UTC().Format(backupTime)
	for _, path := range []string{n.at.store(), n.at.sequence()} {
		err := os.Rename(path, path+suffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return kept, err
		}
		kept = append(kept, path+suffix)
	}
	return kept, nil
}

// restore fills the place of the store from the backup that was named.
func (n *node) restore() error {
	f, err := os.Open(n.restoreFrom)
	if err != nil {
		return err
	}
	defer f.Close()
	return metadata.Restore(n.at.store(), bufio.NewReader(f), metadata.Options{Log: n.log, SequenceFile: n.at.sequence()})
}

func (n *node) printQuarantine(ctx context.Context, out io.Writer) error {
	all, err := n.pools.Quarantined(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "quarantined: %d\n", len(all))
	for _, q := range all {
		fmt.Fprintf(out, "  %s: %s (%d bytes)\n", q.Name, q.Reason, q.Bytes)
	}
	return nil
}

package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"holdfast/blockdev/cage"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/preflight"
)

// The values of the setting cage.
const (
	cageRequired = "required"
	cageOff      = "off"
)

// InsideCage is the argument with which holdfastd is the process inside a cage.
const InsideCage = "cage-inside"

// runDir holds what is gone with the next boot. Everybody may pass it: the cages'
// root is nobody on this host, and the state directory is closed to others.
const runDir = "/run/holdfast"

// openCages begins to make cages, which readyCages waits for: it takes as long as
// all the rest of a start.
func (n *node) openCages(ctx context.Context) error {
	if n.c.Cage == cageOff {
		n.log.Warn("filesystem tools run as root on this host, without a cage: whoever shapes a volume's bytes can attack them")
		return nil
	}
	o, err := n.cageOptions()
	if err != nil {
		return err
	}
	done := make(chan struct{})
	var opened error
	n.caging = func() error {
		<-done
		return opened
	}
	go func() {
		defer close(done)
		n.cages, opened = cage.Open(ctx, o)
	}()
	n.later("cages", func() error {
		<-done
		if n.cages == nil {
			return nil
		}
		return n.cages.Close()
	})
	return nil
}

// readyCages waits for what openCages began.
func (n *node) readyCages(context.Context) error {
	n.tools = filesystem.NewTools()
	if n.c.Cage == cageOff {
		return nil
	}
	if err := n.caging(); err != nil {
		return fmt.Errorf("%w: %w; to run filesystem tools as root on this host instead, and trust every tenant with it, set cage = \"off\" (--cage=off)", ErrHost, err)
	}
	if missing := n.cages.Limits(); len(missing) > 0 {
		n.log.Warn("control groups bound cages by process only", "missing", strings.Join(missing, ", "))
	}
	n.tools = n.tools.In(n.cages)
	return nil
}

func (n *node) cageOptions() (cage.Options, error) {
	id, err := n.hostID()
	if err != nil {
		return cage.Options{}, err
	}
	if err := errors.Join(os.MkdirAll(runDir, 0o711), os.Chmod(runDir, 0o711)); err != nil { //nolint:gosec // see runDir
		return cage.Options{}, err
	}
	name := id[:min(12, len(id))]
	return cage.Options{
		Name: name, Dir: filepath.Join(runDir, "cages-"+name), Inside: []string{InsideCage},
		Warm: n.c.CageWarm, Memory: n.c.CageMemory, Log: n.log,
	}, nil
}

// removeCages removes what a daemon that was killed has left.
func (n *node) removeCages(ctx context.Context) error {
	o, err := n.cageOptions()
	if err != nil {
		return err
	}
	return cage.Remove(ctx, o)
}

// cageCheck says whether filesystem tools can run in cages, without starting one.
func cageCheck(c Config) preflight.Check {
	check := preflight.Check{Name: "cage", Status: preflight.OK, Found: "runc and user namespaces are there"}
	missing := cage.Missing("")
	switch {
	case c.Cage == cageOff:
		check.Status, check.Found = preflight.Warn, "off"
		check.Consequence = "e2fsck, resize2fs, xfs_repair and btrfs read what tenants have written as root on this host"
		check.Fix = "set cage = \"required\""
	case len(missing) > 0:
		reason, fix, _ := strings.Cut(missing[0], ": ")
		check.Status, check.Found = preflight.Fail, reason
		check.Consequence = "the daemon does not start: filesystem tools would read what tenants have written as root"
		check.Fix = fix + "; or set cage = \"off\" and trust every tenant"
	}
	return check
}

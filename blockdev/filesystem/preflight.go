package filesystem

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"holdfast/internal/run"
)

// Bits of a capability set (include/uapi/linux/capability.h).
const (
	capSysAdmin    = 21
	capSysResource = 24
)

// CanGrowMounted tells whether this process may grow a mounted filesystem of
// type t: nil, or ErrCannotGrowMounted with the reason. The kernel has the last
// word when it is asked to.
func (x Tools) CanGrowMounted(t Type) error {
	switch t {
	case Ext4:
		return canGrowExt4()
	case XFS, Btrfs:
		return haveCapability(capSysAdmin, "CAP_SYS_ADMIN")
	}
	return errors.ErrUnsupported
}

func canGrowExt4() error { return haveCapability(capSysResource, "CAP_SYS_RESOURCE") }

func haveCapability(bit uint, name string) error {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		set, ok := strings.CutPrefix(lines.Text(), "CapEff:")
		if !ok {
			continue
		}
		caps, err := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
		if err != nil {
			return fmt.Errorf("capabilities of this process: %w", err)
		}
		if caps&(1<<bit) != 0 {
			return nil
		}
		return fmt.Errorf("%w: this process lacks %s", ErrCannotGrowMounted, name)
	}
	return errors.New("capabilities of this process: /proc/self/status does not tell")
}

// Programs are the programs that work on filesystems of type t.
func (t Type) Programs() []string {
	switch t {
	case Ext4:
		return []string{"mke2fs", "e2fsck", "resize2fs", "tune2fs"}
	case XFS:
		return []string{"mkfs.xfs", "xfs_repair"}
	case Btrfs:
		return []string{"mkfs.btrfs", "btrfs"}
	}
	return nil
}

// Missing tells which of a type's programs are not installed.
func (x Tools) Missing(t Type) []string {
	var missing []string
	for _, name := range t.Programs() {
		if _, err := run.Look(name); err != nil {
			missing = append(missing, name)
		}
	}
	return missing
}

// MountOptions are what every mount of a type by the host is given, as the
// keys, or key=value pairs, of the new mount interface.
func MountOptions(t Type) []string {
	switch t {
	case Ext4:
		// Lazily zeroing inode tables would fill the holes of a sparse image; they
		// read as zero already.
		return []string{"errors=remount-ro", "noinit_itable"}
	}
	return nil
}

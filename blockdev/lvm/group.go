package lvm

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"holdfast/blockdev"
	"holdfast/internal/run"
)

// pvRow is a device of a volume group, and what LVM tells of the group with it.
type pvRow struct {
	Name   string `json:"pv_name"`
	Extent string `json:"vg_extent_size"`
	Attr   string `json:"vg_attr"` // vgs(8): "wz--n-"
	System string `json:"vg_systemid"`
}

const pvColumns = "pv_name,vg_name,vg_extent_size,vg_attr,vg_systemid"

// groupDevices finds the devices of a volume group, and its extent size. It looks
// at all devices of the host, once.
func groupDevices(ctx context.Context, group string) (devices []string, extent int64, err error) {
	rows, err := askPVs(ctx, group)
	if err != nil {
		return nil, 0, err
	}
	if len(rows) == 0 { // perhaps another host's: LVM shows those only when told to
		if rows, err = askPVs(ctx, group, "--foreign", "--readonly"); err != nil {
			return nil, 0, err
		}
		if len(rows) == 0 {
			return nil, 0, fmt.Errorf("%w: no device belongs to volume group %s", errNoGroup, group)
		}
		return nil, 0, fmt.Errorf("%w: volume group %s belongs to the host with the system ID %q: vgchange --systemid, on that host or with its disks at rest", errNoGroup, group, rows[0].System)
	}
	return readPVs(group, rows)
}

func askPVs(ctx context.Context, group string, more ...string) ([]pvRow, error) {
	text, err := lvm(ctx, append([]string{"pvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", pvColumns, "-S", "vg_name=" + group}, more...)...)
	if err != nil {
		return nil, err
	}
	return parsePVs(text)
}

func parsePVs(text []byte) ([]pvRow, error) {
	var report struct {
		Report []struct {
			PV []pvRow `json:"pv"`
		} `json:"report"`
	}
	if err := json.Unmarshal(text, &report); err != nil || len(report.Report) != 1 {
		return nil, fmt.Errorf("%w: pvs: %.200q: %w", errNonsense, text, err)
	}
	return report.Report[0].PV, nil
}

func readPVs(group string, rows []pvRow) (devices []string, extent int64, err error) {
	for _, pv := range rows {
		attr := pv.Attr + "------"
		switch {
		case strings.HasPrefix(pv.Name, "[") || attr[3] == 'p': // "[unknown]"
			return nil, 0, fmt.Errorf("%w: a disk of volume group %s is missing: attach it, or vgreduce --removemissing", errNoGroup, group)
		case attr[2] == 'x':
			return nil, 0, fmt.Errorf("%w: volume group %s is exported: vgimport", errNoGroup, group)
		case attr[0] == 'r':
			return nil, 0, fmt.Errorf("%w: volume group %s is read-only", errNoGroup, group)
		}
		if extent, err = strconv.ParseInt(pv.Extent, 10, 64); err != nil || extent < sector || !strings.HasPrefix(pv.Name, "/dev/") {
			return nil, 0, fmt.Errorf("%w: pvs: device %q, extents of %q bytes", errNonsense, pv.Name, pv.Extent)
		}
		devices = append(devices, pv.Name)
	}
	return devices, extent, nil
}

// tools are the programs that the backend, or LVM for it, calls.
var tools = []string{"lvm", "thin_ls", "thin_check", "mkfs.ext4"}

// haveTools tells what is not installed.
func haveTools() error {
	for _, name := range tools {
		if _, err := run.Look(name); err != nil {
			return fmt.Errorf("%w: %w (the packages lvm2, thin-provisioning-tools and e2fsprogs)", blockdev.ErrInvalid, err)
		}
	}
	return nil
}

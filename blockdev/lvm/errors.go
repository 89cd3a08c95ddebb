package lvm

import (
	"errors"
	"fmt"
	"strings"

	"holdfast/blockdev"
	"holdfast/internal/run"
)

var (
	// errNoGroup: the volume group or pool is not there, not on these devices, or not
	// this host's.
	errNoGroup = errors.New("the volume group or thin pool is not there")
	// errNonsense: what a tool says cannot be read. Nothing of it is believed.
	errNonsense = errors.New("the answer makes no sense")
)

// classify reads LVM's text: its exit code is 5 for everything.
func classify(err error) error {
	var e *run.Error
	if !errors.As(err, &e) {
		return err
	}
	for _, c := range []struct {
		text     string
		sentinel error
	}{
		{" in use.", blockdev.ErrBusy},
		{"is used by another device", blockdev.ErrBusy},
		{"contains a filesystem in use", blockdev.ErrBusy},
		{"already exists in volume group", blockdev.ErrExists},
		{"Failed to find logical volume", blockdev.ErrNotFound},
		{"Existing logical volume", blockdev.ErrNotFound}, // "… not found in volume group"
		{"Volume group \"", errNoGroup},                   // "… not found"
		{"not found in Volume group", errNoGroup},
		{"is exported", errNoGroup},
		{"Cannot access VG", errNoGroup},              // "… with system ID X …": another host's
		{"Cannot change VG", blockdev.ErrNeedsRepair}, // "… while PVs are missing"
		{"insufficient free space", blockdev.ErrNoSpace},
		{"Insufficient free space", blockdev.ErrNoSpace},
		{"Free space in pool", blockdev.ErrNoSpace},
		{"reached threshold", blockdev.ErrNoSpace},
		{"VG metadata too large", blockdev.ErrNoSpace},
		{"is read-only", blockdev.ErrNeedsRepair},
		{"is read only", blockdev.ErrNeedsRepair},
		{"needs check", blockdev.ErrNeedsRepair},
		{"Manual repair required", blockdev.ErrNeedsRepair}, // thin_check has found damage
		{"transaction_id", blockdev.ErrNeedsRepair},         // LVM and the pool disagree on what was made
	} {
		if strings.Contains(e.Stderr, c.text) {
			return fmt.Errorf("%w: %w", c.sentinel, err)
		}
	}
	return err
}

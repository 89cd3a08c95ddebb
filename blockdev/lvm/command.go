package lvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/internal/run"
)

// commandTime bounds one LVM command: they take a tenth of a second, and wait for
// each other's lock on the volume group.
const commandTime = 2 * time.Minute

// filter shows LVM these devices and no others (lvm.conf(5), devices/filter).
func filter(devices []string) string {
	var b strings.Builder
	b.WriteString("devices{filter=[")
	for _, d := range devices {
		// The pattern's delimiter, and the quotes of the setting, are in no path of a device.
		fmt.Fprintf(&b, `"a|^%s$|",`, regexp.QuoteMeta(d))
	}
	b.WriteString(`"r|.*|"]}`)
	return b.String()
}

// lvm runs one LVM command on the group's devices alone.
func (p *Pool) lvm(ctx context.Context, args ...string) ([]byte, error) {
	p.devicesMu.RLock()
	config := filter(p.devices)
	p.devicesMu.RUnlock()
	return lvm(ctx, append(args, "--config", config)...)
}

func lvm(ctx context.Context, args ...string) ([]byte, error) {
	r, err := run.Run(ctx, run.Cmd{
		Args: append([]string{"lvm"}, args...), Timeout: commandTime,
		Env: []string{"LVM_SUPPRESS_FD_WARNINGS=1"}, OutputLimit: 64 << 20,
	})
	return r.Stdout, classify(err)
}

// change runs a command that changes the group's metadata, and makes the change
// durable.
func (p *Pool) change(ctx context.Context, args ...string) error {
	p.changing.Lock()
	defer p.changing.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err := p.lvm(ctx, append([]string{args[0], "-qq", "-y"}, args[1:]...)...)
	return errors.Join(err, p.flushDevices())
}

// flushDevices has the physical volumes write their caches.
func (p *Pool) flushDevices() error {
	p.devicesMu.RLock()
	defer p.devicesMu.RUnlock()
	for _, path := range p.devices {
		if err := syncDevice(path); err != nil {
			return err
		}
	}
	return nil
}

// syncDevice flushes a device. An error is never to be answered by another flush.
func syncDevice(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return errors.Join(fmt.Errorf("%w: %s: %w", blockdev.ErrFailed, path, err), f.Close())
	}
	return f.Close()
}

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
		{"insufficient free space", blockdev.ErrNoSpace},
		{"Insufficient free space", blockdev.ErrNoSpace},
		{"Free space in pool", blockdev.ErrNoSpace},
		{"reached threshold", blockdev.ErrNoSpace},
		{"VG metadata too large", blockdev.ErrNoSpace},
		{"is read-only", errPoolState},
		{"needs check", errPoolState},
	} {
		if strings.Contains(e.Stderr, c.text) {
			return fmt.Errorf("%w: %w", c.sentinel, err)
		}
	}
	return err
}

var (
	// errNoGroup: the volume group or pool is not there, or not on these devices.
	errNoGroup = errors.New("the volume group or thin pool is not there")
	// errPoolState: the kernel or LVM refuses to change the pool.
	errPoolState = errors.New("the thin pool cannot be changed: see the pool's state")
)

// row is one logical volume of a report; LVM gives all values as text.
type row struct {
	Name   string `json:"lv_name"`
	Size   string `json:"lv_size"`
	Tags   string `json:"lv_tags"`
	Active string `json:"lv_active"` // when it was asked
	Pool   string `json:"pool_lv"`
	ThinID string `json:"thin_id"`
	Zero   string `json:"zero"`
	Chunk  string `json:"chunk_size"`
	Layout string `json:"lv_layout"`
}

const columns = "lv_name,lv_size,lv_tags,lv_active,pool_lv,thin_id,zero,chunk_size,lv_layout"

func (r row) bytes() (int64, error) { return strconv.ParseInt(r.Size, 10, 64) }

// report asks LVM for the volumes that a selection fits (lvmreport(7)); absent ones
// are no error.
func (p *Pool) report(ctx context.Context, selection string) ([]row, error) {
	text, err := p.lvm(ctx, "lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", columns, "-S", selection, p.group)
	if err != nil {
		return nil, err
	}
	return parseRows(text)
}

func parseRows(text []byte) ([]row, error) {
	var report struct {
		Report []struct {
			LV []row `json:"lv"`
		} `json:"report"`
	}
	if err := json.Unmarshal(text, &report); err != nil || len(report.Report) == 0 {
		return nil, fmt.Errorf("lvs gave no report: %.200q: %w", text, err)
	}
	return report.Report[0].LV, nil
}

// groupDevices finds the devices of a volume group, and its extent size. It looks
// at all devices of the host, once.
func groupDevices(ctx context.Context, group string) (devices []string, extent int64, err error) {
	text, err := lvm(ctx, "pvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", "pv_name,vg_name,vg_extent_size", "-S", "vg_name="+group)
	if err != nil {
		return nil, 0, err
	}
	var report struct {
		Report []struct {
			PV []struct {
				Name   string `json:"pv_name"`
				Extent string `json:"vg_extent_size"`
			} `json:"pv"`
		} `json:"report"`
	}
	if err := json.Unmarshal(text, &report); err != nil || len(report.Report) == 0 {
		return nil, 0, fmt.Errorf("pvs gave no report: %.200q: %w", text, err)
	}
	for _, pv := range report.Report[0].PV {
		if strings.HasPrefix(pv.Name, "[") { // "[unknown]": a device of the group is missing
			return nil, 0, fmt.Errorf("%w: a disk of the volume group is missing", errNoGroup)
		}
		devices = append(devices, pv.Name)
		if extent, err = strconv.ParseInt(pv.Extent, 10, 64); err != nil {
			return nil, 0, fmt.Errorf("pvs: extent size %q: %w", pv.Extent, err)
		}
	}
	if len(devices) == 0 {
		return nil, 0, fmt.Errorf("%w: no device belongs to volume group %s", errNoGroup, group)
	}
	return devices, extent, nil
}

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

// ask runs an LVM command that changes nothing, on the group's devices alone.
func (p *Pool) ask(ctx context.Context, args ...string) (text []byte, err error) {
	err = p.fault.effect("ask "+args[0], func() error {
		text, err = lvm(ctx, append(args, "--config", p.config())...)
		return p.lost(err)
	})
	return text, err
}

// lost is for a group that was there when the pool was opened, and is not any more.
func (p *Pool) lost(err error) error {
	if p.meta != nil && errors.Is(err, errNoGroup) {
		return fmt.Errorf("%w: look at its disks (dmesg): %w", blockdev.ErrNeedsRepair, err)
	}
	return err
}

// tell runs an LVM command that changes something. It is not ended with ctx: one
// that is killed may leave devices suspended, and whoever uses them hangs. what is
// for fault.
func (p *Pool) tell(ctx context.Context, what string, args ...string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return p.fault.effect(what, func() error {
		_, err := lvm(context.WithoutCancel(ctx), append(append([]string{args[0], "-qq", "-y"}, args[1:]...), "--config", p.config())...)
		return p.lost(err)
	})
}

func (p *Pool) config() string {
	p.devicesMu.RLock()
	defer p.devicesMu.RUnlock()
	return filter(p.devices)
}

func lvm(ctx context.Context, args ...string) ([]byte, error) {
	r, err := run.Run(ctx, run.Cmd{
		Args: append([]string{"lvm"}, args...), Timeout: commandTime,
		Env: []string{"LVM_SUPPRESS_FD_WARNINGS=1"}, OutputLimit: 64 << 20,
	})
	return r.Stdout, classify(err)
}

// change runs a command that changes the group's metadata, and makes the change
// durable. What it did to our volumes is put into the table; what is for fault.
func (p *Pool) change(ctx context.Context, what string, does outcome, args ...string) error {
	p.changing.Lock()
	defer p.changing.Unlock()
	before := p.state()
	if err := p.tell(ctx, what, args...); err != nil {
		return p.explain(err)
	}
	p.changed(before, does)
	return p.explain(p.flushDevices())
}

// flushDevices has the physical volumes write their caches.
func (p *Pool) flushDevices() error {
	p.devicesMu.RLock()
	defer p.devicesMu.RUnlock()
	for _, path := range p.devices {
		if err := p.fault.effect("flush the group", func() error { return syncDevice(path) }); err != nil {
			return err
		}
	}
	return nil
}

// flushVolume has a volume write its cache.
func (p *Pool) flushVolume(name string) error {
	return p.explain(p.fault.effect("flush", func() error { return syncDevice(p.node(name)) }))
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

func (r row) tags() []string { return strings.Split(r.Tags, ",") }

func (r row) bytes() (int64, error) { return strconv.ParseInt(r.Size, 10, 64) }

// report asks LVM for the volumes that a selection fits (lvmreport(7)); absent ones
// are no error.
func (p *Pool) report(ctx context.Context, selection string) ([]row, error) {
	text, err := p.ask(ctx, "lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", columns, "-S", selection, p.group)
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
	if err := json.Unmarshal(text, &report); err != nil || len(report.Report) != 1 {
		return nil, fmt.Errorf("%w: lvs: %.200q: %w", errNonsense, text, err)
	}
	for _, r := range report.Report[0].LV {
		if size, err := r.bytes(); r.Name == "" || err != nil || size < 0 {
			return nil, fmt.Errorf("%w: lvs: volume %q of %q bytes", errNonsense, r.Name, r.Size)
		}
	}
	return report.Report[0].LV, nil
}

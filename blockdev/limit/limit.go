package limit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// Limiter sets and lifts limits. It keeps nothing: what holds is in the kernel.
// It is safe for concurrent use; calls for one device are serialised by the caller.
type Limiter struct {
	proc string // "/proc"
	v1   string // where the blkio controller's root cgroup is; empty: not here
	v2   string // where the unified hierarchy with an io controller is; empty: not here
	why  error  // neither is

	startTime func(pid int) (uint64, error)
}

// The files of blkio's blk-throttle, with the limit that each takes.
const (
	v1ReadIOPS   = "blkio.throttle.read_iops_device"
	v1WriteIOPS  = "blkio.throttle.write_iops_device"
	v1ReadBytes  = "blkio.throttle.read_bps_device"
	v1WriteBytes = "blkio.throttle.write_bps_device"
	v2Max        = "io.max"
)

// MaxIOPS is the largest number that the kernel takes.
const MaxIOPS = math.MaxUint32

// New finds the host's controller. One that is missing is no error: Explain says so.
func New() (*Limiter, error) {
	infos, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("limit: mountinfo: %w", err)
	}
	return find("/proc", infos), nil
}

func find(proc string, mounts []*mountinfo.Info) *Limiter {
	l := &Limiter{proc: proc, startTime: sys.StartTime}
	for _, m := range mounts {
		if m.Root != "/" { // a part of the hierarchy: its root is not the kernel's
			continue
		}
		switch m.FSType {
		case "cgroup2":
			if controllers, err := os.ReadFile(filepath.Join(m.Mountpoint, "cgroup.controllers")); err == nil && slices.Contains(strings.Fields(string(controllers)), "io") {
				l.v2 = m.Mountpoint
			}
		case "cgroup":
			if _, err := os.Stat(filepath.Join(m.Mountpoint, v1WriteBytes)); err == nil && slices.Contains(strings.Split(m.VFSOptions, ","), "blkio") {
				l.v1 = m.Mountpoint
			}
		}
	}
	if l.v1 == "" && l.v2 == "" {
		l.why = fmt.Errorf("this host has no io controller (cgroup v2) and no blkio controller with throttling (cgroup v1): %w", errors.ErrUnsupported)
	}
	return l
}

// Explain tells how limits hold for a target, errors.ErrUnsupported with the
// reason where they cannot. One without a process is the whole host.
func (l *Limiter) Explain(t attach.Target, readOnly bool) (blockdev.Enforcement, error) {
	switch {
	case l.why != nil:
		return blockdev.Enforcement{}, l.why
	case l.v2 != "" && t.Pid == 0:
		return blockdev.Enforcement{}, fmt.Errorf("cgroup v2 bounds cgroups and not the whole host: attach to a container: %w", errors.ErrUnsupported)
	case l.v2 != "":
		return blockdev.Enforcement{Mechanism: "cgroup v2 io.max", Gaps: []string{"the filesystem's journal"}}, nil
	}
	e := blockdev.Enforcement{Mechanism: "cgroup v1 blk-throttle"}
	if t.Pid == 0 {
		e.Gaps = append(e.Gaps, "processes in a blkio cgroup of their own, except for what the kernel writes back for them later")
		return e, nil
	}
	if !readOnly {
		e.Gaps = append(e.Gaps, "direct writes (and an fsync's) and writes that the kernel does later have the write limits each: both at once reach up to twice the limit")
	}
	e.Gaps = append(e.Gaps, "blkio cgroups that the sandbox makes below its own")
	return e, nil
}

// Apply makes exactly these limits hold for the target's use of a block device;
// the zero Limits lift all. blockdev.ErrGone when the sandbox is not there;
// lifting is success then. errors.ErrUnsupported as Explain.
func (l *Limiter) Apply(_ context.Context, device string, t attach.Target, readOnly bool, limits blockdev.Limits) error {
	return blockdev.Op("limit.Apply", "", l.apply(device, t, readOnly, limits))
}

func (l *Limiter) apply(device string, t attach.Target, readOnly bool, limits blockdev.Limits) error {
	if _, err := l.Explain(t, readOnly); err != nil {
		if limits.None() {
			return nil
		}
		return err
	}
	if err := check(limits); err != nil {
		return err
	}
	place, err := sys.PlaceBehind(device)
	if err != nil {
		return err
	}
	major, minor := sys.MajorMinor(place.RDevice)
	number := fmt.Sprintf("%d:%d", major, minor)
	group := "/"
	if t.Pid != 0 {
		group, err = l.groupOf(t)
		if errors.Is(err, blockdev.ErrGone) && limits.None() {
			group, err = "", nil // its cgroup went with it, and its rules
		}
		if err != nil {
			return err
		}
	}
	if l.v2 != "" {
		return l.applyV2(group, number, limits)
	}
	return l.applyV1(group, number, readOnly, limits)
}

func check(l blockdev.Limits) error {
	for _, n := range []int64{l.ReadIOPS, l.WriteIOPS, l.ReadBytes, l.WriteBytes} {
		if n < 0 {
			return fmt.Errorf("%w: a limit of %d", blockdev.ErrInvalid, n)
		}
	}
	if l.ReadIOPS > MaxIOPS || l.WriteIOPS > MaxIOPS {
		return fmt.Errorf("%w: more than %d requests per second", blockdev.ErrInvalid, int64(MaxIOPS))
	}
	return nil
}

// groupOf asks the kernel for the cgroup of the sandbox's process.
func (l *Limiter) groupOf(t attach.Target) (string, error) {
	b, err := os.ReadFile(filepath.Join(l.proc, strconv.Itoa(t.Pid), "cgroup"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", blockdev.ErrGone
	}
	if err != nil {
		return "", err
	}
	// Read second: then the first answer was still this process's.
	if start, err := l.startTime(t.Pid); err != nil || start != t.StartTime {
		return "", fmt.Errorf("%w: process %d is another one now", blockdev.ErrGone, t.Pid)
	}
	for line := range bytes.Lines(b) { // "7:blkio:/path", "0::/path"
		parts := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		v2 := parts[0] == "0" && parts[1] == ""
		v1 := slices.Contains(strings.Split(parts[1], ","), "blkio")
		if l.v2 != "" && v2 || l.v2 == "" && v1 {
			if !filepath.IsLocal("." + parts[2]) { // outside of our cgroup namespace
				return "", fmt.Errorf("the sandbox's cgroup is not below this server's: %w", errors.ErrUnsupported)
			}
			return parts[2], nil
		}
	}
	return "", fmt.Errorf("process %d is in no cgroup of the controller: %w", t.Pid, errors.ErrUnsupported)
}

func (l *Limiter) applyV1(group, number string, readOnly bool, limits blockdev.Limits) error {
	whole := map[string]int64{v1ReadIOPS: limits.ReadIOPS, v1WriteIOPS: limits.WriteIOPS, v1ReadBytes: limits.ReadBytes, v1WriteBytes: limits.WriteBytes}
	rules := map[string]map[string]int64{}
	if group != "" {
		rules[group] = whole
	}
	if group != "/" && !readOnly { // what the kernel writes for the sandbox
		rules["/"] = map[string]int64{v1WriteIOPS: limits.WriteIOPS, v1WriteBytes: limits.WriteBytes}
	}
	var failures error
	for group, files := range rules {
		for file, limit := range files {
			err := write(filepath.Join(l.v1, group, file), fmt.Sprintf("%s %d", number, limit))
			if limits.None() && errors.Is(err, fs.ErrNotExist) {
				continue // the cgroup is gone
			}
			failures = errors.Join(failures, err)
		}
	}
	return failures
}

func (l *Limiter) applyV2(group, number string, limits blockdev.Limits) error {
	if group == "" {
		return nil
	}
	if group == "/" {
		return fmt.Errorf("the sandbox is in the root cgroup, which has no limits: %w", errors.ErrUnsupported)
	}
	most := func(n int64) string {
		if n == 0 {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	err := write(filepath.Join(l.v2, group, v2Max), fmt.Sprintf("%s rbps=%s wbps=%s riops=%s wiops=%s",
		number, most(limits.ReadBytes), most(limits.WriteBytes), most(limits.ReadIOPS), most(limits.WriteIOPS)))
	if errors.Is(err, fs.ErrNotExist) {
		if limits.None() {
			return nil
		}
		return fmt.Errorf("the io controller is not enabled for the sandbox's cgroup: %w", errors.ErrUnsupported)
	}
	return err
}

// write gives the kernel one rule in one write, as its files want it.
func write(path, rule string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(rule)
	return errors.Join(err, f.Close())
}

package vmtest_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/guest/agent"
	"holdfast/internal/vmtest"
)

// TestGuest: what a guest is for works in it, and what is plugged in is seen.
func TestGuest(t *testing.T) {
	v := vmtest.Start(t, vmtest.Options{Disks: []int64{1 << 30}})
	t.Logf("started in %v", v.Started.Round(time.Millisecond))
	disk, err := v.Disk(t.Context(), "disk0")
	if err != nil {
		t.Fatal(err)
	}
	v.Sh(t, "set -e; vgcreate -q vg "+disk+"; lvcreate -q -L 512M -T vg/pool; lvcreate -q -V 100M -T vg/pool -n one; mkfs.ext4 -q /dev/vg/one; mount /dev/vg/one /mnt; echo hello > /mnt/a; umount /mnt")
	if got := v.Sh(t, "lvs --noheadings -o lv_name vg | tr -d ' ' | sort | tr '\n' ' '"); got != "one pool " {
		t.Errorf("volumes %q", got)
	}
	// What ext4 needs to grow while mounted, the guest allows.
	v.Sh(t, "set -e; mount /dev/vg/one /mnt; lvextend -q -L 200M vg/one; resize2fs /dev/vg/one 2>/dev/null; umount /mnt")

	image := filepath.Join(v.Dir, "late.img")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 64<<20)); err != nil {
		t.Fatal(err)
	}
	if err := v.Plug(t.Context(), "late", image, 3); err != nil {
		t.Fatal(err)
	}
	if late, err := v.Disk(t.Context(), "late"); err != nil || late == disk {
		t.Errorf("the disk plugged in later: %q, %v", late, err)
	}
}

// TestGuestsDiffer: guests from one saved state make different random numbers, and
// know the time.
func TestGuestsDiffer(t *testing.T) {
	a, b := vmtest.Start(t, vmtest.Options{}), vmtest.Start(t, vmtest.Options{})
	const random = "od -An -N16 -tx1 /dev/urandom"
	if x, y := a.Sh(t, random), b.Sh(t, random); x == y || len(x) < 32 {
		t.Errorf("random numbers %q and %q", x, y)
	}
	now, err := time.Parse("2006-01-02 15:04:05", a.Sh(t, "date -u '+%Y-%m-%d %H:%M:%S'"))
	if err != nil || time.Since(now).Abs() > time.Minute {
		t.Errorf("the guest's time is %v, %v", now, err)
	}
}

func TestCommandsThatFail(t *testing.T) {
	v := vmtest.Start(t, vmtest.Options{})
	err := v.Run(t.Context(), "sh", "-c", "echo out; echo because >&2; exit 3")
	var failed *agent.ExitError
	if !errors.As(err, &failed) || failed.Result.Code != 3 || !strings.Contains(err.Error(), "because") {
		t.Errorf("%v", err)
	}
	if err := v.Run(t.Context(), "/no/such/program"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := v.Run(ctx, "sleep", "1000"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if text, err := v.Output(t.Context(), "sh", "-c", "pidof sleep || echo none"); err != nil || text != "none" {
		t.Errorf("after the deadline: %q, %v", text, err)
	}
	if err := v.Do(t.Context(), "quit", nil); err != nil {
		t.Fatal(err)
	}
	if err := v.Run(t.Context(), "true"); !errors.Is(err, agent.ErrLost) {
		t.Errorf("after the guest has ended: %v", err)
	}
}

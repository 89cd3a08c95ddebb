package guesttest_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/vmtest"
)

// volumeAgent builds the agent and starts it in a guest.
func volumeAgent(t *testing.T, g *vmtest.VM) (socket string) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "holdfast-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "holdfast/cmd/holdfast-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	socket, err := g.VolumeAgent(ctx, program)
	must(t, err)
	return socket
}

// TestAgent: with the agent in the guest a volume is mounted where it was asked for,
// grows there with its filesystem, is trimmed, frozen, thawed and counted, is not
// taken away while somebody uses it, and leaves whole for the next guest.
func TestAgent(t *testing.T) {
	blockdevtest.LeakCheck(t)
	one, two := vmtest.Start(t, vmtest.Options{}), vmtest.Start(t, vmtest.Options{})
	d := start(t, one, two)
	ctx, c := t.Context(), d.Client
	agents := map[*vmtest.VM]string{one: volumeAgent(t, one), two: volumeAgent(t, two)}
	attach := func(g *vmtest.VM, name, holder string) client.Attachment {
		t.Helper()
		a := into(g, holder)
		a.Target.Agent, a.MountPath = agents[g], "/mnt/"+name
		made, err := c.Attach(ctx, name, a)
		must(t, err)
		return made
	}
	for kind, size := range map[string]int64{"ext4": 64, "xfs": 320, "btrfs": 128} {
		_, err := c.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: kind}, Spec: client.VolumeSpec{Size: size, Filesystem: kind}}, "")
		must(t, err)
		a := attach(one, kind, "sandbox:one")
		if a.Remains != "" {
			t.Errorf("what remains to the guest: %q", a.Remains)
		}
		must(t, one.Run(ctx, "sh", "-c", fmt.Sprintf("dd if=/dev/urandom of=/mnt/%[1]s/junk bs=1M count=16 && echo kept > /mnt/%[1]s/file && sync", kind)))

		before := used(t, one, kind, 2)
		larger := size * 2
		_, err = c.UpdateVolume(ctx, kind, client.VolumeChange{SizeMiB: &larger})
		must(t, err)
		v := await(t, c, kind, func(v client.Volume) bool { return v.State.Sizes.Pending == "" })
		if v.Spec.Size != larger {
			t.Errorf("%s: %+v", kind, v.Spec)
		}
		if after := used(t, one, kind, 2); after < before*3/2 {
			t.Errorf("%s: the filesystem in the guest had %d KiB and has %d", kind, before, after)
		}

		must(t, one.Run(ctx, "sh", "-c", "rm /mnt/"+kind+"/junk"))
		trimmed, err := c.Trim(ctx, kind)
		must(t, err)
		if trimmed.Freed < 10<<20 {
			t.Errorf("%s: a trim frees %d bytes", kind, trimmed.Freed)
		}
		stats, err := c.Stats(ctx, kind)
		must(t, err)
		if stats.Filesystem == nil || stats.Filesystem.Total < size<<20 {
			t.Errorf("%s: statistics %+v", kind, stats)
		}
	}

	_, err := c.Freeze(ctx, "ext4", 30*time.Second)
	must(t, err)
	must(t, one.Run(ctx, "sh", "-c", "(echo late > /mnt/ext4/late) >/dev/null 2>&1 &"))
	_, err = c.Thaw(ctx, "ext4")
	must(t, err)
	must(t, one.Run(ctx, "sh", "-c", "until grep -q late /mnt/ext4/late; do sleep 0.05; done"))

	must(t, one.Run(ctx, "sh", "-c", "sleep 1000 < /mnt/xfs/file >/dev/null 2>&1 & echo $! > /run/holder"))
	at := attachmentOf(t, c, "xfs")
	_, err = c.Detach(ctx, "xfs", at.ID)
	refused(t, err, "CONFLICT", "in use")
	if still := attachmentOf(t, c, "xfs"); still.Phase != "attached" {
		t.Errorf("after a detach that was refused: %+v", still)
	}
	must(t, one.Run(ctx, "sh", "-c", "cat /mnt/xfs/file && kill $(cat /run/holder) && while kill -0 $(cat /run/holder) 2>/dev/null; do sleep 0.05; done"))
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		_, err := c.Detach(ctx, kind, attachmentOf(t, c, kind).ID)
		must(t, err)
		if out, _ := one.Output(ctx, "sh", "-c", "grep -c /mnt/"+kind+" /proc/mounts"); strings.TrimSpace(out) != "0" {
			t.Errorf("%s is still mounted in the first guest", kind)
		}
		attach(two, kind, "sandbox:two")
		if out, err := two.Output(ctx, "cat", "/mnt/"+kind+"/file"); err != nil || strings.TrimSpace(out) != "kept" {
			t.Errorf("%s in the second guest: %q, %v", kind, out, err)
		}
	}

	// An agent that is gone hinders a detach that could lose something, and no force.
	must(t, two.Run(ctx, "sh", "-c", "kill $(pidof hf-agent)"))
	_, err = c.Detach(ctx, "btrfs", attachmentOf(t, c, "btrfs").ID)
	if err == nil {
		t.Error("a detach is acknowledged although nobody unmounted it")
	}
	for _, kind := range []string{"btrfs", "ext4", "xfs"} {
		_, err := c.ForceDetach(ctx, kind, attachmentOf(t, c, kind).ID)
		must(t, err)
	}
}

// TestAgentDies: growth waits for an agent that is gone, and so does a detach, which
// goes on when it is back; force needs none, and nothing new is mounted without one.
func TestAgentDies(t *testing.T) {
	blockdevtest.LeakCheck(t)
	g := vmtest.Start(t, vmtest.Options{})
	d := start(t, g)
	ctx, c := t.Context(), d.Client
	socket := volumeAgent(t, g)
	mountedAt := func(holder, path string) client.Attachment {
		a := into(g, holder)
		a.Target.Agent, a.MountPath = socket, path
		return a
	}
	const dies = "kill -9 $(pidof hf-agent); while pidof hf-agent >/dev/null; do sleep 0.01; done"
	_, err := c.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: "v"}, Spec: client.VolumeSpec{Size: 64}}, "")
	must(t, err)
	a, err := c.Attach(ctx, "v", mountedAt("sandbox:one", "/mnt/v"))
	must(t, err)
	must(t, g.Run(ctx, "sh", "-c", dies))
	larger := int64(96)
	v, err := c.UpdateVolume(ctx, "v", client.VolumeChange{SizeMiB: &larger})
	must(t, err)
	if s := v.State.Sizes; s == nil || !strings.Contains(s.Pending, "does not answer") {
		t.Errorf("grown without an agent: %+v", s)
	}
	_, err = c.Detach(ctx, "v", a.ID)
	refused(t, err, "CONFLICT", "does not answer")
	if now := attachmentOf(t, c, "v"); now.Phase != "detaching" {
		t.Errorf("%+v", now)
	}
	must(t, g.Run(ctx, "sh", "-c", "/run/hf-agent >/run/hf-agent.log 2>&1 </dev/null &"))
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		left, err := c.Attachments(ctx, "v")
		must(t, err)
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the detach does not go on: %+v", left)
		}
	}

	a, err = c.Attach(ctx, "v", mountedAt("sandbox:two", "/mnt/v"))
	must(t, err)
	if n := used(t, g, "v", 2); n < 80<<10 {
		t.Errorf("attached anew its filesystem has %d KiB", n)
	}
	must(t, g.Run(ctx, "sh", "-c", dies))
	_, err = c.ForceDetach(ctx, "v", a.ID)
	must(t, err)
	must(t, g.Run(ctx, "true")) // the machine lives
	_, err = c.Attach(ctx, "v", mountedAt("sandbox:three", "/mnt/w"))
	refused(t, err, "CONFLICT", "does not answer")
	if left, err := c.Attachments(ctx, "v"); err != nil || len(left) != 0 {
		t.Errorf("%+v, %v", left, err)
	}
}

func attachmentOf(t *testing.T, c *client.Client, name string) client.Attachment {
	t.Helper()
	all, err := c.Attachments(t.Context(), name)
	must(t, err)
	if len(all) != 1 {
		t.Fatalf("%s has attachments %+v", name, all)
	}
	return all[0]
}

// used reads a column of df in the guest, in KiB.
func used(t *testing.T, g *vmtest.VM, name string, column int) int64 {
	t.Helper()
	out, err := g.Output(t.Context(), "df", "-k", "/mnt/"+name)
	must(t, err)
	words := strings.Fields(out[strings.LastIndex(out, "\n")+1:])
	n, err := strconv.ParseInt(words[column-1], 10, 64)
	must(t, err)
	return n
}

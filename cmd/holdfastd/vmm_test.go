package main_test

import (
	"path/filepath"
	"strings"
	"testing"

	"holdfast/api/client"
	"holdfast/blockdev/attach/firecracker"
	"holdfast/blockdev/attach/vmmtest"
)

// only gives the one disk that a VMM has.
func only(t *testing.T, vm *vmmtest.VMM) vmmtest.Disk {
	t.Helper()
	disks := vm.Seen().Disks
	if len(disks) != 1 {
		t.Fatalf("disks: %+v", disks)
	}
	for _, d := range disks {
		return d
	}
	return vmmtest.Disk{}
}

func toVMM(kind, socket string) client.Attachment {
	return client.Attachment{Holder: "sandbox:vm", Target: client.Target{Type: kind, Socket: socket}}
}

// A volume goes to a microVM before it boots, grows in it, and is free when the
// microVM ends; the daemon may die meanwhile. The VMM is our server of its protocol.
func TestVolumeInFirecracker(t *testing.T) {
	socket := vmmtest.Socket(t)
	vm := vmmtest.Start(t, vmmtest.Firecracker, socket)
	n := newNode(t, "--vm-sockets", filepath.Dir(socket), "--firecracker-io-engine", "Async")
	ctx := t.Context()
	n.create("data", client.VolumeSpec{Size: 16})

	code, out := command(t, holdfast, "--socket", filepath.Join(n.state, "holdfastd.sock"), "--workspace", "main",
		"attachment", "create", "data", "--holder", "sandbox:vm", "--firecracker-socket", socket)
	if code != 0 || !strings.Contains(out, "firecracker:"+socket) {
		t.Fatalf("%d %s", code, out)
	}
	if d := only(t, vm); d.Size != 16<<20 || !strings.Contains(string(d.Config), `"io_engine":"Async"`) {
		t.Errorf("the drive: %+v", d)
	}
	vm.Steer("boot")
	n.kill()
	n.start()
	size := int64(32)
	_, err := n.UpdateVolume(ctx, "data", client.VolumeChange{SizeMiB: &size})
	must(t, err)
	if d := only(t, vm); d.Size != 32<<20 {
		t.Errorf("grown: %+v", d)
	}

	v, err := n.Volume(ctx, "data")
	must(t, err)
	_, err = n.SetLimits(ctx, "data", v.State.Attachments[0].ID, client.RateLimits{WriteIOPS: 100})
	if err == nil || !strings.Contains(err.Error(), "give both") {
		t.Errorf("limits of one direction: %v", err)
	}
	_, err = n.SetLimits(ctx, "data", v.State.Attachments[0].ID, client.RateLimits{ReadIOPS: 100, WriteIOPS: 100})
	must(t, err)
	if d := only(t, vm); !strings.Contains(string(d.Config), `"ops":{"refill_time":1000,"size":200}`) {
		t.Errorf("limited: %+v", d)
	}

	n.create("late", client.VolumeSpec{Size: 16})
	_, err = n.Attach(ctx, "late", toVMM(firecracker.Type, socket))
	if err == nil || !strings.Contains(err.Error(), "has been started") {
		t.Errorf("attached after boot: %v", err)
	}
	v, err = n.Volume(ctx, "data")
	must(t, err)
	if len(v.State.Attachments) != 1 {
		t.Fatalf("attachments: %+v", v.State.Attachments)
	}
	_, err = n.Detach(ctx, "data", v.State.Attachments[0].ID)
	if err == nil || !strings.Contains(err.Error(), "end the microVM") {
		t.Errorf("detached from a running microVM: %v", err)
	}
	vm.Kill()
	n.untilDetached(t, "data")
}

// A volume is plugged into a running VM of Cloud Hypervisor, grows, leaves, and is
// taken by force from one whose guest does not let it go.
func TestVolumeInCloudHypervisor(t *testing.T) {
	socket := vmmtest.Socket(t)
	vm := vmmtest.Start(t, vmmtest.CloudHypervisor, socket)
	n := newNode(t, "--vm-sockets", filepath.Dir(socket))
	ctx := t.Context()
	vm.Steer("create")
	vm.Steer("boot")
	n.create("data", client.VolumeSpec{Size: 16})

	code, out := command(t, holdfast, "--socket", filepath.Join(n.state, "holdfastd.sock"), "--workspace", "main",
		"attachment", "create", "data", "--holder", "sandbox:vm", "--cloud-hypervisor-socket", socket)
	if code != 0 || !strings.Contains(out, "cloud-hypervisor:"+socket) {
		t.Fatalf("%d %s", code, out)
	}
	size := int64(32)
	_, err := n.UpdateVolume(ctx, "data", client.VolumeChange{SizeMiB: &size})
	must(t, err)
	v, err := n.Volume(ctx, "data")
	must(t, err)
	a := v.State.Attachments[0]
	if d := only(t, vm); d.Size != 32<<20 || a.Serial == "" || !strings.Contains(string(d.Config), `"serial":"`+a.Serial+`"`) {
		t.Errorf("the disk: %+v, the attachment: %+v", d, a)
	}

	_, err = n.Detach(ctx, "data", a.ID)
	must(t, err)
	if disks := vm.Seen().Disks; len(disks) != 0 {
		t.Errorf("left: %+v", disks)
	}

	limited := toVMM("cloud-hypervisor", socket)
	limited.Limits = &client.RateLimits{ReadBytes: 1 << 20, WriteBytes: 1 << 20}
	again, err := n.Attach(ctx, "data", limited)
	must(t, err)
	if d := only(t, vm); !strings.Contains(string(d.Config), `"bandwidth":{"refill_time":1000,"size":2097152}`) || len(again.Enforcement.Gaps) == 0 {
		t.Errorf("limited: %+v, %+v", d, again.Enforcement)
	}
	_, err = n.SetLimits(ctx, "data", again.ID, client.RateLimits{})
	if err == nil || !strings.Contains(err.Error(), "detach the volume") {
		t.Errorf("other limits: %v", err)
	}
	vm.Steer("deaf")
	_, err = n.ForceDetach(ctx, "data", again.ID)
	must(t, err)
	<-vm.Ended()
	n.untilDetached(t, "data")
}

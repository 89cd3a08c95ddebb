package qemu

import (
	"encoding/json"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qmp"
)

// Arguments are QEMU's for a machine that is started with a request's volume. Node
// and device have the names that they have when they are plugged in, so that a
// monitor of the machine can be told of a growth (Attacher.Resized) and of other limits
// (Attacher.Limit).
//
// A volume that a worker serves needs memory that is shared, besides. It gets one queue,
// which every worker has.
//
// The image is read and written by threads, which every QEMU has.
func Arguments(r attach.Request) []string {
	if r.Endpoint.Kind == blockdev.VhostUser {
		return []string{
			"-chardev", "socket,id=" + lineName(r) + ",path=" + strings.ReplaceAll(r.Endpoint.Path, ",", ",,") + ",server=off,reconnect=1",
			"-device", "vhost-user-blk-pci,id=" + deviceName(r.Volume) + ",chardev=" + lineName(r) + ",num-queues=1",
		}
	}
	driver := "file"
	if r.Endpoint.Kind == blockdev.Block {
		driver = "host_device"
	}
	readOnly := onOff(r.ReadOnly)
	group, _ := json.Marshal(qmp.Args{"qom-type": "throttle-group", "id": groupName(r.Volume), "limits": throttle(r.Limits)}) // of strings and numbers
	node := []string{"node-name=" + nodeName(r.Volume), "driver=throttle", "throttle-group=" + groupName(r.Volume), "file.driver=raw"}
	for _, below := range []string{"", "file.", "file.file."} { // the filter, the format, the file
		node = append(node, below+"read-only="+readOnly, below+"discard=unmap", below+"cache.direct=on", below+"cache.no-flush=off")
	}
	node = append(node, "file.file.driver="+driver, "file.file.filename="+strings.ReplaceAll(r.Endpoint.Path, ",", ",,"), "file.file.aio=threads", "file.file.locking=on")
	device := []string{
		"virtio-blk-pci", "id=" + deviceName(r.Volume), "drive=" + nodeName(r.Volume), "serial=" + Serial(r.Volume),
		"werror=enospc", "rerror=report", // as addDevice has them
	}
	return []string{"-object", string(group), "-blockdev", strings.Join(node, ","), "-device", strings.Join(device, ",")}
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

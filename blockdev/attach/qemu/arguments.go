package qemu

import (
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// Arguments are QEMU's for a machine that is started with a request's volume. Node
// and device have the names that they have when they are plugged in, so that a
// monitor of the machine can be told of a growth (Attacher.Resized).
//
// The image is read and written by threads, which every QEMU has.
func Arguments(r attach.Request) []string {
	driver := "file"
	if r.Endpoint.Kind == blockdev.Block {
		driver = "host_device"
	}
	readOnly := onOff(r.ReadOnly)
	node := []string{
		"driver=raw", "node-name=" + nodeName(r.Volume), "read-only=" + readOnly, "discard=unmap", "cache.direct=on", "cache.no-flush=off",
		"file.driver=" + driver, "file.filename=" + strings.ReplaceAll(r.Endpoint.Path, ",", ",,"), "file.read-only=" + readOnly,
		"file.discard=unmap", "file.cache.direct=on", "file.cache.no-flush=off", "file.aio=threads", "file.locking=on",
	}
	device := []string{
		"virtio-blk-pci", "id=" + deviceName(r.Volume), "drive=" + nodeName(r.Volume), "serial=" + Serial(r.Volume),
		"werror=enospc", "rerror=report", // as addDevice has them
	}
	return []string{"-blockdev", strings.Join(node, ","), "-device", strings.Join(device, ",")}
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

package cloudhypervisor

import (
	"fmt"
	"strings"

	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmsocket"
)

// Arguments are Cloud Hypervisor's for a machine that is started with a request's
// volume: of version 51 or newer, for older ones guess an image's format and refuse
// image_type. A volume that a worker serves needs memory that is shared, besides.
// errors.ErrUnsupported for limits that it does not have, see Explain.
func Arguments(r attach.Request) ([]string, error) {
	if d := diskOf(r); d.Served {
		return []string{"--disk", strings.Join([]string{"vhost_user=on", "socket=" + quoted(d.Socket), "id=" + d.ID, "readonly=" + onOff(d.ReadOnly)}, ",")}, nil
	}
	rates, err := vmsocket.RatesOf(r.Limits, r.ReadOnly)
	if err != nil {
		return nil, err
	}
	d := diskOf(r)
	options := []string{
		"path=" + quoted(d.Path), "direct=on", "readonly=" + onOff(d.ReadOnly), "image_type=" + strings.ToLower(d.Image),
		"id=" + d.ID, "serial=" + d.Serial,
	}
	options = append(append(options, bucket("bw", rates.Bandwidth)...), bucket("ops", rates.Ops)...)
	return []string{"--disk", strings.Join(options, ",")}, nil
}

// quoted is a path as a value of an option: its parser takes a quoted one as it is.
func quoted(path string) string {
	if strings.ContainsAny(path, `,"[]`) {
		return `"` + path + `"`
	}
	return path
}

func bucket(name string, b *vmsocket.Bucket) []string {
	if b == nil {
		return nil
	}
	return []string{fmt.Sprintf("%s_size=%d", name, b.Size), fmt.Sprintf("%s_refill_time=%d", name, b.Refill)}
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

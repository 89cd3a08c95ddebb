package cloudhypervisor

import (
	"strings"

	"holdfast/blockdev/attach"
)

// Arguments are Cloud Hypervisor's for a machine that is started with a request's
// volume: of version 51 or newer, for older ones guess an image's format and refuse
// image_type.
func Arguments(r attach.Request) []string {
	d := diskOf(r)
	path := d.Path
	if strings.ContainsAny(path, `,"[]`) { // its parser takes a quoted value as it is
		path = `"` + path + `"`
	}
	return []string{"--disk", strings.Join([]string{
		"path=" + path, "direct=on", "readonly=" + onOff(d.ReadOnly), "image_type=" + strings.ToLower(d.Image),
		"id=" + d.ID, "serial=" + d.Serial,
	}, ",")}
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

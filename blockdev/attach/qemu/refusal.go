package qemu

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach/qmp"
)

// The classes of QEMU's errors (QapiErrorClass) that mean something by themselves. Most
// are GenericError, whose text alone says what it is.
const (
	commandNotFound = "CommandNotFound"
	deviceNotFound  = "DeviceNotFound"
)

// hostPath is an absolute path in a sentence, quoted as a rule.
var hostPath = regexp.MustCompile(`(^|[^\pL\pN])/[^'"]*`)

// refused gives the refusal in an error, nil for an error of another kind.
func refused(err error) *qmp.Error {
	var r *qmp.Error
	errors.As(err, &r)
	return r
}

func isRefusal(err error) bool { return refused(err) != nil }

// meanings of what QEMU says: block/file-posix.c, block.c, softmmu/qdev-monitor.c and
// hw/pci/pci.c have the sentences. The first that fits holds.
var meanings = []struct {
	parts []string // one of them is in the text
	means string
}{
	{[]string{`Failed to get "`, `Failed to get shared "`, "Failed to lock byte", "Is another process using the image"}, "the image is locked: another program, or another disk of this machine, has it"},
	{[]string{"Permission denied", "Operation not permitted"}, "the virtual machine's process may not open the image: it needs access to the pool's files"},
	{[]string{"No such file or directory", "No such device"}, "the virtual machine's process does not find the image: it needs access to the pool's files at this server's path"},
	{[]string{"Read-only file system"}, "the image is on a filesystem that is read-only for the virtual machine's process"},
	{[]string{"Duplicate device ID", "Duplicate nodes with node-name", "attempt to add duplicate property"}, "the virtual machine has something of the volume's name already, made a moment ago: try again"},
	{[]string{"Permission conflict on node", "is in use"}, "something else in the virtual machine uses the volume's image"},
	{[]string{"does not support hotplugging"}, "the place for the device takes none while the machine runs: it needs a pcie-root-port (or a virtio-scsi controller) with an id"},
	{[]string{"not available for", "no slot/function available", "Failed to find a free slot", "is full"}, "the virtual machine has no free slot"},
	{[]string{"Cannot find device", "can't find value", "' not found"}, "the virtual machine does not have what the volume needs there any more: try again"},
}

// refusal says what a command that QEMU refused means. Paths of the host that its
// words name are left out. Errors of other kinds stay as they are.
func refusal(err error) error {
	r := refused(err)
	if r == nil {
		return err
	}
	if r.Class == commandNotFound {
		return fmt.Errorf("%w: this QEMU's monitor has no command %s: version 6.0 at least is needed", blockdev.ErrInvalid, r.Command)
	}
	for _, m := range meanings {
		for _, part := range m.parts {
			if strings.Contains(r.Desc, part) {
				return hindered{fmt.Sprintf("%s (%s)", m.means, r.Command), r}
			}
		}
	}
	return hindered{fmt.Sprintf("the virtual machine refused %s: %s (%s)", r.Command, hostPath.ReplaceAllString(r.Desc, "${1}(path)"), r.Class), r}
}

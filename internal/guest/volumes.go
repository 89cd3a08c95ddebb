package guest

import (
	"context"
	"os"
	"path/filepath"

	"holdfast/blockdev/attach/qmp"
	"holdfast/internal/guest/agent"
)

// VolumeAgent starts the product's own agent (cmd/holdfast-guest, a static program
// on this host) in the guest, behind a virtio-serial port, and gives the socket that
// leads to it.
func (v *VM) VolumeAgent(ctx context.Context, program string) (socket string, err error) {
	socket = filepath.Join(v.Dir, "guest")
	address := qmp.Args{"type": "unix", "data": qmp.Args{"path": socket}}
	err = v.Do(ctx, "chardev-add", qmp.Args{"id": "guest", "backend": qmp.Args{"type": "socket", "data": qmp.Args{"addr": address, "server": true, "wait": false}}})
	if err != nil {
		return "", err
	}
	if err := v.Do(ctx, "device_add", qmp.Args{"driver": "virtserialport", "id": "guestport", "chardev": "guest", "name": "io.holdfast.guest.0"}); err != nil {
		return "", err
	}
	in, err := os.Open(program)
	if err != nil {
		return "", err
	}
	defer in.Close()
	const there = "/run/hf-agent"
	if err := v.Command(ctx, agent.Command{Args: []string{"sh", "-c", "cat > " + there + " && chmod 755 " + there}}, in, nil, nil); err != nil {
		return "", err
	}
	return socket, v.Run(ctx, "sh", "-c", there+" >/run/hf-agent.log 2>&1 </dev/null &")
}

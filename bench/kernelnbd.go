package bench

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev/nbddevice"
)

// kernelNBD is a block device of the kernel's NBD client. Only a guest has one here.
type kernelNBD struct{ nbddevice.Device }

// connectKernel makes a device of the default export of the server at a unix socket,
// over one connection. The kernel chooses which, and it has to be the one that is meant.
func connectKernel(device, socket string) (kernelNBD, error) {
	conn, terms, err := nbddevice.Dial(socket, "")
	if err != nil {
		return kernelNBD{}, err
	}
	defer conn.Close() // the kernel has its own
	d, err := nbddevice.Attach("bench:"+socket, terms, conn)
	if err == nil && d.Path != device {
		err = errors.Join(fmt.Errorf("the kernel has made %s, not %s", d.Path, device), d.Abandon())
	}
	return kernelNBD{d}, err
}

// Close takes the device away; it outlives this process else.
func (k kernelNBD) Close() error { return k.Detach(context.Background()) }

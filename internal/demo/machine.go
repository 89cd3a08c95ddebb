package demo

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
	"holdfast/internal/guest"
)

// RunMachines shows what volumes are for virtual machines, in real guests, and
// cleans up, also when a step fails.
func RunMachines(ctx context.Context, o Options) error {
	return play(ctx, o, func(s *show) []act {
		return []act{s.machines, s.startForMachines, s.template, s.machineVolume, s.firstMachine, s.growInMachine, s.leaveMachine, s.secondMachine, s.deleteMachineVolume}
	})
}

const (
	machineVolume = "data"
	machineNote   = "written in the first machine"
)

func (s *show) machines(ctx context.Context) error {
	s.title("Two virtual machines (QEMU, emulated processors): no volume, free slots to plug into")
	for n := range 2 {
		// The first one of all is made: kernel, root filesystem, boot, state.
		err := s.timed(fmt.Sprintf("machine %d runs, and its shell answers", n+1), func() error {
			g, err := guest.Open(ctx, guest.Options{SharedMemory: true})
			if err == nil {
				s.guests = append(s.guests, g)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	out, err := s.inside(ctx, 0, "uname -r; cat /sys/block/*/serial")
	if err != nil {
		return err
	}
	s.say("kernel and disks of machine 1: %s", oneLine(out))
	return nil
}

func (s *show) startForMachines(ctx context.Context) error {
	var sockets []string
	for _, g := range s.guests {
		sockets = append(sockets, g.Dir)
	}
	return s.startDaemon(ctx, "--vm-sockets", strings.Join(sockets, ","))
}

// inside runs a line of shell in a machine.
func (s *show) inside(ctx context.Context, machine int, script string) (string, error) {
	return s.guests[machine].Output(ctx, "sh", "-c", script)
}

func (s *show) machineVolume(ctx context.Context) error {
	s.title("A volume from it")
	for _, name := range []string{"first", machineVolume} {
		err := s.timed(fmt.Sprintf("volume create %s --template demo:1 --size 512", name), func() error {
			_, err := s.daemon.Client.CreateVolume(ctx, client.Volume{
				Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Size: 512, Template: "demo:1"}}, "")
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// plug attaches the volume to a machine, by a transport if one is wanted, and mounts it
// there.
func (s *show) plug(ctx context.Context, machine int, transport string) error {
	var a client.Attachment
	flags := "--qemu-socket"
	if transport != "" {
		flags += " --transport " + transport
	}
	err := s.timed(fmt.Sprintf("attachment create %s %s (machine %d)", machineVolume, flags, machine+1), func() (err error) {
		a, err = s.daemon.Client.Attach(ctx, machineVolume, client.Attachment{
			Holder: fmt.Sprintf("sandbox:machine-%d", machine+1), Target: client.Target{Type: "qemu", Socket: s.guests[machine].Monitor, Transport: transport}})
		return err
	})
	if err != nil {
		return err
	}
	s.serial = a.Serial
	err = s.timed("the guest has the disk", func() (err error) {
		s.node, err = s.guests[machine].Disk(ctx, a.Serial)
		return err
	})
	if err != nil {
		return err
	}
	return s.timed("mounted in the guest", func() error {
		_, err := s.inside(ctx, machine, "mkdir -p /data && mount "+s.node+" /data")
		return err
	})
}

func (s *show) firstMachine(ctx context.Context) error {
	s.title("The running machine gets the volume, and writes to it")
	if err := s.plug(ctx, 0, ""); err != nil {
		return err
	}
	out, err := s.inside(ctx, 0, "ls -x /data; cd '/data/odd names'; echo *; echo '"+machineNote+"' > /data/note; sync")
	if err != nil {
		return err
	}
	s.say("in the guest: %s %s: %s", s.node, s.serial, oneLine(out))
	return nil
}

func (s *show) growInMachine(ctx context.Context) error {
	s.title("Growth under the running machine, mounted: device and filesystem")
	before, err := s.inside(ctx, 0, "df -m /data | tail -n 1")
	if err != nil {
		return err
	}
	size := int64(1024)
	err = s.timed(fmt.Sprintf("volume update %s --size %d", machineVolume, size), func() error {
		_, err := s.daemon.Client.UpdateVolume(ctx, machineVolume, client.VolumeChange{SizeMiB: &size})
		return err
	})
	if err != nil {
		return err
	}
	err = s.timed("the guest sees "+bytesize.Human(size<<20), func() error {
		_, err := s.guests[0].DiskOf(ctx, s.serial, size<<20)
		return err
	})
	if err != nil {
		return err
	}
	err = s.timed("ext4 has grown in the guest", func() error {
		_, err := s.inside(ctx, 0, "resize2fs "+s.node)
		return err
	})
	if err != nil {
		return err
	}
	after, err := s.inside(ctx, 0, "df -m /data | tail -n 1")
	if err != nil {
		return err
	}
	s.say("df before: %s", oneLine(before))
	s.say("df after:  %s", oneLine(after))
	return nil
}

func (s *show) leaveMachine(ctx context.Context) error {
	s.title("Out of the running machine")
	err := s.timed("unmounted in the guest", func() error {
		_, err := s.inside(ctx, 0, "umount /data")
		return err
	})
	if err != nil {
		return err
	}
	if err := s.detach(ctx, machineVolume); err != nil {
		return err
	}
	out, err := s.inside(ctx, 0, "cat /sys/block/*/serial")
	if err != nil {
		return err
	}
	s.say("disks that machine 1 has now: %s", oneLine(out))
	return nil
}

func (s *show) secondMachine(ctx context.Context) error {
	s.title("The volume outlives it: the first machine is killed, the same data in the second")
	err := s.timed("machine 1 killed", func() error { return s.guests[0].Close() })
	if err != nil {
		return err
	}
	transport := ""
	if s.hasWorker() {
		transport = "vhost-user"
		s.say("this time a worker serves it, over a socket and the guest's memory")
	}
	if err := s.plug(ctx, 1, transport); err != nil {
		return err
	}
	out, err := s.inside(ctx, 1, "cat /data/note")
	if err != nil {
		return err
	}
	if out != machineNote {
		return fmt.Errorf("the second machine reads %q", out)
	}
	s.say("in the guest: cat /data/note: %s", out)
	if out, err = s.inside(ctx, 1, "find /data | wc -l; df -m /data | tail -n 1; umount /data"); err != nil {
		return err
	}
	s.say("entries, and df: %s", oneLine(out))
	return s.detach(ctx, machineVolume)
}

func (s *show) deleteMachineVolume(ctx context.Context) error {
	s.title("Deletion, and what the host never did")
	v, err := s.daemon.Client.Volume(ctx, machineVolume)
	if err != nil {
		return err
	}
	_, err = s.daemon.Client.Attach(ctx, machineVolume, client.Attachment{Holder: "sandbox:host", Target: client.Target{Type: "host", Path: filepath.Join(s.daemon.State, "attach", "data")}})
	if err == nil {
		return errors.New("a filesystem that guests could write was mounted on the host")
	}
	s.say("mounting %s on the host is refused: %v", v.Metadata.Name, err)
	for _, name := range []string{"first", machineVolume} {
		err := s.timed("volume delete "+name, func() error {
			_, err := s.daemon.Client.DeleteVolume(ctx, name)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"holdfast/blockdev/attach/qmp"
	"holdfast/internal/guest/agent"
	"holdfast/internal/run"
)

// Options say what a guest is to be like. The zero value is a guest with 1 GiB of
// memory, eight free root ports, a SCSI controller and no disk but its root.
type Options struct {
	MemoryMiB int      // 0: 1024
	RootPorts int      // free slots for hot-plugging, "rp0" and on; 0: 8
	Disks     []int64  // bytes of blank disks, plugged in with the serials "disk0" and on
	Args      []string // more arguments for QEMU
	// SharedMemory makes the guest's memory a file that other processes can map:
	// vhost-user needs it.
	SharedMemory bool
	// Boot starts the guest by booting it, not from the saved state.
	Boot bool
	// Firmware has the machine's firmware find a disk among Args that boots the guest,
	// and gives it none itself: see Parts. It boots again when it is reset.
	Firmware bool
}

func (o Options) withDefaults() Options {
	if o.MemoryMiB == 0 {
		o.MemoryMiB = 1024
	}
	if o.RootPorts == 0 {
		o.RootPorts = 8
	}
	return o
}

const (
	qemuProgram = "qemu-system-x86_64"
	// bootTime bounds a boot: three seconds on a quiet machine.
	bootTime = 2 * time.Minute
	// cmdline leaves out what costs time under emulation. Above all, programs lie at the
	// same addresses in each process (norandmaps): QEMU keeps what it has translated by
	// address, and would translate all of a program again for each process that runs it,
	// which is more than half of what a command of LVM costs.
	cmdline = "console=ttyS0 quiet panic=-1 mitigations=off nopti nokaslr norandmaps tsc=reliable no_timer_check random.trust_cpu=on apparmor=0 selinux=0 audit=0 cryptomgr.notests rcupdate.rcu_expedited=1 nowatchdog"
)

// arguments are the machine. A saved state fits only the same machine.
func (o Options) arguments(i image) []string {
	memory := strconv.Itoa(o.MemoryMiB)
	machine := "q35" // microvm hangs now and then under emulation
	var args []string
	if o.SharedMemory {
		machine += ",memory-backend=mem"
		args = append(args, "-object", "memory-backend-memfd,id=mem,share=on,size="+memory+"M")
	}
	args = append(args,
		"-accel", "tcg", "-machine", machine, "-cpu", "qemu64,+rdrand", "-m", memory,
		"-nodefaults", "-no-user-config", "-display", "none")
	if !o.Firmware {
		args = append(args, "-no-reboot",
			"-kernel", i.file("vmlinuz"), "-initrd", i.file("initrd"), "-append", cmdline,
			"-blockdev", "driver=raw,node-name=root,read-only=on,file.driver=file,file.locking=off,file.filename="+i.file("root"),
			"-device", "virtio-blk-pci,drive=root,serial=root")
	}
	args = append(args,
		"-device", "virtio-rng-pci", "-device", "virtio-scsi-pci,id=scsi0",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name="+agent.Port)
	for n := range o.RootPorts {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=rp%d,chassis=%d,slot=%d", n, n+1, n+1))
	}
	return append(args, o.Args...)
}

// VM is a running guest.
type VM struct {
	Monitor string // socket of a monitor (QMP) that nobody uses but the guest's owner
	Dir     string // of the guest's sockets and disks
	Started time.Duration

	o       Options
	process *run.Process
	control *qmp.Monitor
	agent   *agent.Client
}

// launch starts QEMU and connects to its monitor.
func launch(ctx context.Context, i image, o Options, more ...string) (_ *VM, err error) {
	dir, err := os.MkdirTemp("", "vm.")
	if err != nil {
		return nil, err
	}
	v := &VM{o: o, Dir: dir, Monitor: filepath.Join(dir, "monitor")}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w\nthe guest's console ends:\n%s", err, v.Console()), v.Close())
		}
	}()
	args := append(append([]string{qemuProgram}, o.arguments(i)...),
		"-serial", "file:"+v.consolePath(),
		"-chardev", "socket,id=agent,server=on,wait=off,path="+filepath.Join(dir, "agent"),
		"-qmp", "unix:"+filepath.Join(dir, "control")+",server=on,wait=off", "-qmp", "unix:"+v.Monitor+",server=on,wait=off")
	log, err := os.Create(filepath.Join(dir, "qemu.log"))
	if err != nil {
		return v, err
	}
	defer log.Close()
	if v.process, err = run.Start(append(args, more...), log, log); err != nil {
		return v, err
	}
	v.control, err = v.connect(ctx)
	return v, err
}

// connect waits for the monitor's socket.
func (v *VM) connect(ctx context.Context) (*qmp.Monitor, error) {
	for {
		m, err := qmp.Dial(ctx, filepath.Join(v.Dir, "control"))
		if err == nil {
			return m, nil
		}
		select {
		case <-v.process.Done():
			b, _ := os.ReadFile(filepath.Join(v.Dir, "qemu.log"))
			return nil, fmt.Errorf("QEMU ended: %s", b)
		case <-ctx.Done():
			return nil, err
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (v *VM) consolePath() string { return filepath.Join(v.Dir, "console") }

// Console is the end of what the guest's kernel and init have said.
func (v *VM) Console() string {
	b, err := os.ReadFile(v.consolePath())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err.Error()
	}
	return string(b[max(0, len(b)-4096):])
}

// Close ends the guest as a power cut does, and removes its files.
func (v *VM) Close() error {
	var err error
	if v.agent != nil {
		_ = v.agent.Close()
	}
	if v.control != nil {
		_ = v.control.Close()
	}
	if v.process != nil {
		err = v.process.Kill()
	}
	return errors.Join(err, os.RemoveAll(v.Dir))
}

// Pid is QEMU's process.
func (v *VM) Pid() int { return v.process.Pid() }

// Do gives QEMU a command, beside whoever uses Monitor.
func (v *VM) Do(ctx context.Context, command string, args qmp.Args) error {
	_, err := v.control.Do(ctx, command, args)
	return err
}

// Reset presses the machine's reset button, and waits for the guest that boots.
func (v *VM) Reset(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	if err := v.agent.Close(); err != nil {
		return err
	}
	if err := v.Do(ctx, "system_reset", nil); err != nil {
		return err
	}
	return v.meet(ctx)
}

// boot starts a guest from power-on and waits for its agent.
func boot(ctx context.Context, i image, o Options) (*VM, error) {
	v, err := launch(ctx, i, o)
	if err != nil {
		return nil, err
	}
	if err := v.meet(ctx); err != nil {
		return nil, errors.Join(err, v.Close())
	}
	return v, nil
}

// meet connects to the agent.
func (v *VM) meet(ctx context.Context) error {
	var err error
	if v.agent, err = agent.Dial(ctx, filepath.Join(v.Dir, "agent")); err != nil {
		return fmt.Errorf("%w\nthe guest's console ends:\n%s", err, v.Console())
	}
	return nil
}

// statePath is where the state of a machine like this one is saved.
func (o Options) statePath(i image) (string, error) {
	program, err := run.Look(qemuProgram)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(program)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(fmt.Sprint(strings.Join(o.arguments(i), "\x00"), info.Size(), info.ModTime().UnixNano())))
	return i.file("state-" + hex.EncodeToString(sum[:8])), nil
}

// warm is what every guest does at first; it is in the saved state.
const warm = "modprobe -a dm-thin-pool dm-snapshot dm-flakey dm-log-writes loop xfs btrfs ext4 sd_mod virtio_scsi; lvm version >/dev/null; mkfs.ext4 -V 2>/dev/null; sync"

// saveState boots a guest and writes its state to a file.
func saveState(ctx context.Context, i image, o Options, to string) (err error) {
	v, err := boot(ctx, i, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if err := v.agent.Run(ctx, agent.Command{Args: []string{"sh", "-c", warm}}, nil, nil, nil); err != nil {
		return err
	}
	if err := v.agent.Close(); err != nil {
		return err
	}
	part := fmt.Sprintf("%s.%d", to, os.Getpid())
	defer os.Remove(part)
	for _, step := range []struct {
		command string
		args    qmp.Args
	}{
		{"migrate-set-parameters", qmp.Args{"max-bandwidth": 1 << 40}},
		{"stop", nil},
		{"migrate", qmp.Args{"uri": "exec:cat > '" + part + "'"}}, // QEMU's own way to a file, before version 8.2
	} {
		if err := v.Do(ctx, step.command, step.args); err != nil {
			return err
		}
	}
	if err := v.migrated(ctx); err != nil {
		return err
	}
	return os.Rename(part, to)
}

// migrated waits until a state has been written or read.
func (v *VM) migrated(ctx context.Context) error {
	for {
		answer, err := v.control.Do(ctx, "query-migrate", nil)
		switch {
		case err != nil:
			return err
		case strings.Contains(string(answer), `"completed"`):
			return nil
		case strings.Contains(string(answer), `"failed"`):
			return fmt.Errorf("the guest's state: %s", answer)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// restore starts a guest from a saved state.
func restore(ctx context.Context, i image, o Options, state string) (*VM, error) {
	v, err := launch(ctx, i, o, "-incoming", "defer")
	if err != nil {
		return nil, err
	}
	err = v.Do(ctx, "migrate-incoming", qmp.Args{"uri": "exec:cat '" + state + "'"})
	if err == nil {
		err = v.migrated(ctx)
	}
	if err == nil {
		err = v.Do(ctx, "cont", nil)
	}
	if err == nil {
		err = v.meet(ctx)
	}
	if err == nil {
		err = v.awake(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, v.Close())
	}
	return v, nil
}

// awake gives a restored guest the time, and random numbers of its own: all that
// come from one state would make the same UUIDs.
func (v *VM) awake(ctx context.Context) error {
	seed, err := os.Open("/dev/urandom")
	if err != nil {
		return err
	}
	defer seed.Close()
	bytes := make([]byte, 512)
	if _, err := io.ReadFull(seed, bytes); err != nil {
		return err
	}
	command := fmt.Sprintf("/init reseed && { date -s @%d.%09d >/dev/null 2>&1 || date -s @%d >/dev/null; }", time.Now().Unix(), time.Now().Nanosecond(), time.Now().Unix())
	return v.agent.Run(ctx, agent.Command{Args: []string{"sh", "-c", command}}, strings.NewReader(string(bytes)), nil, nil)
}

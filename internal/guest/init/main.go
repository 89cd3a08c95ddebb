package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/guest/agent"
)

// commands are what the program does besides being the first process.
var commands = map[string]func(args []string) error{
	"disk":   disk,
	"disks":  disks,
	"watch":  watch,
	"reseed": func([]string) error { return reseed(os.Stdin) },
}

func main() {
	// The kernel gives its first process the parameters that it does not know itself.
	if os.Getpid() != 1 && len(os.Args) > 1 {
		if os.Args[1] == "agent" {
			die(serve())
		}
		command := commands[os.Args[1]]
		if command == nil {
			command = func([]string) error { return errors.New("there is no such command") }
		}
		if err := command(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		return
	}
	for _, step := range []func() error{mountKernel, loadModules, mountRoot, enterRoot, mountVolatile} {
		if err := step(); err != nil {
			die(err)
		}
	}
	die(reap())
}

// die says why on the console and stops the machine.
func die(err error) {
	fmt.Println("GUEST ENDS:", err)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s at %s: %w", kind, target, err)
	}
	return nil
}

func mountKernel() error {
	return errors.Join(mount("proc", "/proc", "proc", 0, ""), mount("sys", "/sys", "sysfs", 0, ""), mount("dev", "/dev", "devtmpfs", 0, ""))
}

// loadModules loads what the root filesystem needs, in the order of the list.
func loadModules() error {
	list, err := os.Open("/modules.list")
	if err != nil {
		return err
	}
	defer list.Close()
	for lines := bufio.NewScanner(list); lines.Scan(); {
		f, err := os.Open(lines.Text())
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("module %s: %w", lines.Text(), err)
		}
	}
	return nil
}

// rootParameter is the kernel's that names the root's node, which it passes on.
const rootParameter = "guest_root"

// rootDisk finds the disk with the serial "root", unless the kernel's command line
// names another.
func rootDisk() (string, error) {
	if name := os.Getenv(rootParameter); name != "" {
		return "/dev/" + name, nil
	}
	disks, err := filepath.Glob("/sys/block/vd*/serial")
	if err != nil {
		return "", err
	}
	for _, path := range disks {
		if serial, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(serial)) == "root" {
			return "/dev/" + filepath.Base(filepath.Dir(path)), nil
		}
	}
	return "", errors.New("there is no disk with the serial root")
}

func mountRoot() error {
	disk, err := rootDisk()
	if err != nil {
		return err
	}
	if err := errors.Join(mount(disk, "/ro", "squashfs", unix.MS_RDONLY, ""), mount("rw", "/rw", "tmpfs", 0, "")); err != nil {
		return err
	}
	if err := errors.Join(os.MkdirAll("/rw/upper", 0o755), os.MkdirAll("/rw/work", 0o755)); err != nil {
		return err
	}
	return mount("root", "/root.new", "overlay", 0, "lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work")
}

func enterRoot() error {
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		to := "/root.new" + dir
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, to, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	return errors.Join(os.Chdir("/root.new"), unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."), os.Chdir("/"))
}

func mountVolatile() error {
	err := errors.Join(
		mount("run", "/run", "tmpfs", 0, ""), mount("tmp", "/tmp", "tmpfs", 0, "size=80%"), mount("shm", "/dev/shm", "tmpfs", 0, ""),
		mount("pts", "/dev/pts", "devpts", 0, ""), os.MkdirAll("/run/lock", 0o755), os.MkdirAll("/var/tmp", 0o777), os.MkdirAll("/mnt", 0o755))
	for name, value := range environment {
		err = errors.Join(err, os.Setenv(name, value))
	}
	return err
}

// environment is what commands in the guest see. There is no udev: device mapper
// makes its nodes itself.
var environment = map[string]string{
	"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C", "DM_DISABLE_UDEV": "1", "LVM_SUPPRESS_FD_WARNINGS": "1", "HOLDFAST_GUEST": "1",
}

// reap starts the agent and waits for whoever ends: it is the first process.
func reap() error {
	p, err := os.StartProcess("/init", []string{"/init", "agent"}, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Env: os.Environ()})
	if err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case pid == p.Pid:
			return fmt.Errorf("the agent ended: %v", status)
		}
	}
}

// reseed gives the kernel's random numbers a new beginning from what it reads, at
// once (random(4), RNDADDENTROPY and RNDRESEEDCRNG).
func reseed(from io.Reader) error {
	var seed struct {
		bits, size int32
		bytes      [512]byte
	}
	if _, err := io.ReadFull(from, seed.bytes[:]); err != nil {
		return err
	}
	seed.bits, seed.size = 8*int32(len(seed.bytes)), int32(len(seed.bytes))
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&seed))); errno != 0 {
		return fmt.Errorf("RNDADDENTROPY: %w", errno)
	}
	const reseedNow = 0x5207 // RNDRESEEDCRNG, include/uapi/linux/random.h
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), reseedNow, 0); errno != 0 {
		return fmt.Errorf("RNDRESEEDCRNG: %w", errno)
	}
	return nil
}

// serve finds the port by its name and runs the agent on it.
func serve() error {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return err
	}
	for _, path := range names {
		name, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(name)) != agent.Port {
			continue
		}
		port, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(path)), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return agent.Serve(patient{port})
	}
	return errors.New("there is no port " + agent.Port)
}

// patient is a port whose other side comes and goes: while nobody is there,
// reading gives the end of the file.
type patient struct{ *os.File }

func (p patient) Read(b []byte) (int, error) {
	for {
		n, err := p.File.Read(b)
		if n > 0 || !errors.Is(err, io.EOF) {
			return n, err
		}
		time.Sleep(2 * time.Millisecond)
	}
}

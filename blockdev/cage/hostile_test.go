package cage_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/cage"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/run"
)

// hostile is a tool that a damaged image has taken over: it tries one thing, says
// on stdout what it could do that it must not, and nothing when it could not.
func hostile(args []string) int {
	breach := func(format string, a ...any) { fmt.Printf(format+"\n", a...) }
	attempts[args[0]](breach, args[1:])
	return 0
}

type report func(format string, args ...any)

var attempts = map[string]func(breach report, args []string){
	"look":    look,
	"write":   write,
	"network": network,
	"others":  others,
	"mount":   mountThings,
	"devices": devices,
	"rights":  rights,
	"fork":    fork,
	"memory":  memory,
	"fill":    fill,
	"flood":   flood,
	"hang":    hang,
}

// look walks everything that there is: nothing of the host but programs and
// libraries, no other image, no process, no kernel's file.
func look(breach report, forbidden []string) {
	for _, path := range append(forbidden, "/etc/passwd", "/etc/shadow", "/root", "/home", "/var", "/run", "/tmp", "/sys/kernel", "/proc/1",
		"/proc/self/root", "/proc/self/fd", "/proc/sys", "/dev/mem", "/dev/shm", "/usr/local/etc", "/usr/share", "/usr/src", "/dev/fd/3") {
		if _, err := os.Lstat(path); err == nil {
			breach("%s is there", path)
		}
	}
	known := []string{"bin", "dev", "device", "etc", "image", "inside", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "usr"}
	entries, err := os.ReadDir("/")
	if err != nil || len(entries) < 8 {
		breach("the root cannot be read: %v", err) // then the test proves nothing
	}
	for _, e := range entries {
		if !slices.Contains(known, e.Name()) {
			breach("/%s is there", e.Name())
		}
	}
	_ = filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if path == "/usr" || err != nil {
			return fs.SkipDir
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() && info.Size() > 0 && path != "/image" && path != "/inside" {
			breach("%s has %d bytes", path, info.Size())
		}
		return nil
	})
	for fd := 3; fd < 1024; fd++ {
		var st syscall.Stat_t
		// Go's own: an epoll and an eventfd have no type.
		if syscall.Fstat(fd, &st) == nil && st.Mode&syscall.S_IFMT != 0 {
			breach("descriptor %d is open, mode %o", fd, st.Mode)
		}
	}
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); name != "PATH" && name != "HOME" && name != "LC_ALL" {
			breach("environment: %s", e)
		}
	}
}

// write tries to leave something anywhere but in the image.
func write(breach report, _ []string) {
	_ = filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil //nolint:nilerr // it cannot be read: look says more
		}
		if os.WriteFile(filepath.Join(path, "left-behind"), []byte("x"), 0o644) == nil {
			breach("a file in %s", path)
		}
		if strings.Count(path, "/") > 3 {
			return fs.SkipDir
		}
		return nil
	})
	for _, path := range []string{"/inside", "/usr/bin/true", "/usr/sbin/e2fsck", "/etc/mtab", "/proc/mounts"} {
		if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
			breach("%s can be written", path)
			f.Close()
		}
		for what, err := range map[string]error{
			"chmod": os.Chmod(path, 0o777), "remove": os.Remove(path), "rename": os.Rename(path, path+"x"),
			"link": os.Link(path, "/dev/x"), "symlink": os.Symlink("x", path+"y"),
		} {
			if err == nil {
				breach("%s %s", what, path)
			}
		}
	}
	for what, err := range map[string]error{
		"remove the image": os.Remove("/image"), "rename the image": os.Rename("/image", "/other"), "execute the image": exec.Command("/image").Run(),
	} {
		if err == nil {
			breach("%s", what)
		}
	}
}

func network(breach report, _ []string) {
	for family := range 46 {
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_RAW, unix.SOCK_SEQPACKET} {
			if _, err := unix.Socket(family, kind, 0); err == nil {
				breach("socket of family %d, type %d", family, kind)
			}
		}
	}
	if _, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0); err == nil {
		breach("socketpair")
	}
	if c, err := net.DialTimeout("tcp", "127.0.0.1:22", time.Second); err == nil {
		breach("connected")
		c.Close()
	}
}

// others tries to reach processes of this host, by the numbers that it has there,
// and the trusted one inside.
func others(breach report, args []string) {
	pids := []int{1, 2, -1, 0}
	for _, a := range args {
		pid, _ := strconv.Atoi(a)
		pids = append(pids, pid)
	}
	for _, pid := range pids[4:] {
		if err := syscall.Kill(pid, 0); err == nil {
			breach("process %d of the host can be signalled", pid)
		}
		if _, err := unix.PidfdOpen(pid, 0); err == nil {
			breach("process %d of the host can be opened", pid)
		}
	}
	// The first process takes no signal from inside.
	if err := syscall.Kill(1, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.EPERM) {
		breach("kill 1: %v", err)
	}
	for _, pid := range []int{1, os.Getppid()} {
		if err := unix.PtraceAttach(pid); err == nil {
			breach("traces %d", pid)
		}
		if err := unix.PtraceSeize(pid); err == nil {
			breach("traces %d", pid)
		}
		local := []unix.Iovec{{Base: new(byte), Len: 1}}
		if _, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: 0x400000, Len: 1}}, 0); err == nil {
			breach("reads the memory of %d", pid)
		}
		if pidfd, err := unix.PidfdOpen(pid, 0); err == nil {
			if _, err := unix.PidfdGetfd(pidfd, 3, 0); err == nil {
				breach("takes the socket from %d", pid)
			}
			if err := unix.Setns(pidfd, unix.CLONE_NEWNS); err == nil {
				breach("enters the namespaces of %d", pid)
			}
		}
	}
}

func mountThings(breach report, _ []string) {
	_, fsopenErr := unix.Fsopen("tmpfs", 0)
	_, treeErr := unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE)
	_, treeErr2 := unix.OpenTree(unix.AT_FDCWD, "/", 0)
	for what, err := range map[string]error{
		"mount tmpfs":   unix.Mount("none", "/device", "tmpfs", 0, ""),
		"mount proc":    unix.Mount("none", "/proc", "proc", 0, ""),
		"bind":          unix.Mount("/usr", "/device", "", unix.MS_BIND, ""),
		"remount":       unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, ""),
		"mount image":   unix.Mount("/image", "/device", "ext4", 0, ""),
		"umount":        unix.Unmount("/image", unix.MNT_DETACH),
		"umount root":   unix.Unmount("/", unix.MNT_DETACH),
		"fsopen":        fsopenErr,
		"open_tree":     errors.Join(treeErr, treeErr2),
		"chroot":        unix.Chroot("/usr"),
		"pivot_root":    unix.PivotRoot("/usr", "/usr"),
		"unshare user":  unix.Unshare(unix.CLONE_NEWUSER),
		"unshare mount": unix.Unshare(unix.CLONE_NEWNS),
		"mount_setattr": unix.MountSetattr(unix.AT_FDCWD, "/", 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}),
		"clone user":    (&exec.Cmd{Path: "/usr/bin/true", SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}}).Run(),
		"clone mount":   (&exec.Cmd{Path: "/usr/bin/true", SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}}).Run(),
	} {
		if err == nil {
			breach("%s", what)
		}
	}
	if err := (&exec.Cmd{Path: "/usr/bin/true"}).Run(); err != nil {
		breach("clone without flags fails, so the above proves nothing: %v", err)
	}
}

// devices tries to make and open the host's devices.
func devices(breach report, args []string) {
	for _, a := range args {
		number, _ := strconv.ParseUint(a, 10, 64)
		for _, dir := range []string{"/", "/dev", "/device", "/etc"} {
			path := filepath.Join(dir, "node")
			for _, kind := range []uint32{unix.S_IFBLK, unix.S_IFCHR} {
				if unix.Mknod(path, kind|0o666, int(number)) == nil { //nolint:gosec // a device number
					breach("makes device %s in %s", a, dir)
				}
			}
		}
	}
	fine := []string{"null", "zero", "full", "random", "urandom", "tty", "ptmx", "fd", "stdin", "stdout", "stderr", "core", "pts", "mqueue", "shm"}
	entries, err := os.ReadDir("/dev")
	if err != nil {
		breach("%v", err)
	}
	for _, e := range entries {
		if !slices.Contains(fine, e.Name()) {
			breach("/dev/%s is there", e.Name())
		}
	}
}

// rights looks at what the process may.
func rights(breach report, _ []string) {
	for c := range 64 {
		if v, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err == nil && v != 0 {
			breach("capability %d could be had", c)
		}
		if v, err := unix.PrctlRetInt(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_IS_SET, uintptr(c), 0, 0); err == nil && v != 0 {
			breach("capability %d is ambient", c)
		}
	}
	if v, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || v != 1 {
		breach("new privileges: %d, %v", v, err)
	}
	if v, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0); err != nil || v != unix.SECCOMP_MODE_FILTER {
		breach("seccomp mode %d, %v", v, err)
	}
	_, keyErr := unix.KeyctlGetKeyringID(unix.KEY_SPEC_USER_KEYRING, true)
	_, ringErr := unix.AddKey("user", "x", []byte("x"), unix.KEY_SPEC_PROCESS_KEYRING)
	_, _, bpfErr := unix.Syscall(unix.SYS_BPF, 0, 0, 0)
	for what, err := range map[string]error{
		"setuid": unix.Setresuid(1000, 1000, 1000), "setgroups": unix.Setgroups([]int{1}), "sethostname": unix.Sethostname([]byte("x")),
		"chown": os.Chown("/image", 1000, 1000), "keyring": keyErr, "key": ringErr,
		"raise limit": unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}),
		"oom score":   os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0),
		"nice":        syscall.Setpriority(syscall.PRIO_PROCESS, 0, -20),
		"reboot":      unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF),
	} {
		if err == nil {
			breach("%s", what)
		}
	}
	image, err := os.OpenFile("/image", os.O_RDWR, 0)
	if err != nil {
		breach("%v", err)
	}
	for what, request := range map[string]uint{
		"FICLONE": unix.FICLONE, "FS_IOC_SETFLAGS": unix.FS_IOC_SETFLAGS, "FS_IOC_FSSETXATTR": 0x401c5820, "FS_IOC_GETFSMAP": 0xc0c0583b, "FIFREEZE": 0xc0045877,
		"TIOCSTI": unix.TIOCSTI,
	} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, image.Fd(), uintptr(request), 0); errno != unix.ENOSYS {
			breach("ioctl %s reaches the file system: %v", what, errno)
		}
	}
	if bpfErr == 0 {
		breach("bpf")
	}
}

// fork starts processes until it is refused.
func fork(breach report, _ []string) {
	for n := range 2000 {
		if err := exec.Command("/inside", hostileArgument, "hang").Start(); err != nil {
			if n > 200 {
				breach("%d processes", n)
			}
			return
		}
	}
	breach("2000 processes")
}

func memory(breach report, _ []string) {
	var kept [][]byte
	for range 1 << 10 {
		b := make([]byte, 1<<20)
		for i := range b {
			b[i] = byte(i)
		}
		kept = append(kept, b)
	}
	breach("has %d MiB of memory", len(kept))
}

// fill tries to take more of the pool than the image has.
func fill(breach report, _ []string) {
	signal.Ignore(syscall.SIGXFSZ)
	_ = unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 1 << 50, Max: 1 << 50}) // says that it could
	f, err := os.OpenFile("/image", os.O_RDWR, 0)
	if err != nil {
		breach("the image cannot be opened, so the test proves nothing: %v", err)
		return
	}
	info, err := f.Stat()
	if err != nil {
		breach("%v", err)
		return
	}
	if _, err := f.WriteAt([]byte("x"), info.Size()); err == nil {
		breach("writes behind the image's end")
	}
	if f.Truncate(2*info.Size()) == nil {
		breach("makes the image longer")
	}
	if unix.Fallocate(int(f.Fd()), 0, info.Size(), 1<<30) == nil {
		breach("allocates behind the image's end")
	}
	if _, err := f.WriteAt([]byte("x"), info.Size()-1); err != nil {
		breach("cannot write the image, so the test proves nothing: %v", err)
	}
}

func flood(report, []string) {
	line := []byte(strings.Repeat("\x1b[2J flood ", 1000))
	for range 10_000 {
		_, _ = os.Stdout.Write(line)
		_, _ = os.Stderr.Write(line)
	}
}

// hang ignores all that can be ignored, in a session of its own.
func hang(report, []string) {
	signal.Ignore()
	_, _ = syscall.Setsid()
	time.Sleep(time.Hour)
}

// attempt runs the hostile tool in a cage and gives what it could do.
func attempt(t *testing.T, k filesystem.Cage, what string, args ...string) (string, error) {
	t.Helper()
	res, err := k.Run(t.Context(), run.Cmd{Args: append([]string{"/inside", hostileArgument, what}, args...), Timeout: time.Minute})
	return string(res.Stdout), err
}

func TestHostileTool(t *testing.T) {
	blockdevtest.LeakCheck(t)
	c := open(t, func(o *cage.Options) { o.Warm = 1; o.Memory = 128 << 20 })
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("of another tenant"), 0o644))
	own, other := image(t, 16<<20), image(t, 16<<20)
	neighbour := enter(t, c, other) // at work at the same time
	pids := []string{strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getppid())}
	disk, err := os.Stat("/")
	must(t, err)
	root := strconv.FormatUint(disk.Sys().(*syscall.Stat_t).Dev, 10) //nolint:forcetypeassert // Linux
	loopControl := strconv.FormatUint(unix.Mkdev(10, 237), 10)
	firstLoop := strconv.FormatUint(unix.Mkdev(7, 0), 10)
	for what, args := range map[string][]string{
		"look": {secret, own, other}, "write": nil, "network": nil, "others": pids, "mount": nil,
		"devices": {root, loopControl, firstLoop}, "rights": nil, "fork": nil, "fill": nil,
	} {
		t.Run(what, func(t *testing.T) {
			k := enter(t, c, own)
			out, err := attempt(t, k, what, args...)
			if what == "fork" && err != nil && strings.Contains(err.Error(), "more memory") {
				err = nil // that bound was reached first
			}
			if err != nil || out != "" {
				t.Errorf("it could, in spite of the cage:\n%s%v", out, err)
			}
			if what == "fork" {
				return // there is room for no more
			}
			if _, err := k.Run(t.Context(), run.Cmd{Args: []string{"true"}}); err != nil {
				t.Errorf("the cage has lost its first process: %v", err)
			}
		})
	}
	if info, err := os.Stat(own); err != nil || info.Size() != 16<<20 {
		t.Errorf("the image has %d bytes, %v", info.Size(), err)
	}
	must(t, filesystem.NewTools().Check(t.Context(), other, filesystem.Ext4, false))
	must(t, neighbour.Close())
}

func TestMemoryIsBounded(t *testing.T) {
	c := open(t, func(o *cage.Options) { o.Memory = 128 << 20 })
	k := enter(t, c, image(t, 16<<20))
	out, err := attempt(t, k, "memory")
	var failed *run.Error
	if out != "" || !errors.As(err, &failed) || !strings.Contains(err.Error(), "more memory than the 128 MiB") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestOutputIsBounded(t *testing.T) {
	c := open(t, nil)
	k := enter(t, c, image(t, 16<<20))
	res, err := k.Run(t.Context(), run.Cmd{Args: []string{"/inside", hostileArgument, "flood"}})
	if err != nil || !res.Truncated || len(res.Stdout) != 64<<10 || len(res.Stderr) != 64<<10 {
		t.Errorf("%d and %d bytes, %v, %v", len(res.Stdout), len(res.Stderr), res.Truncated, err)
	}
	_, err = k.Run(t.Context(), run.Cmd{Args: []string{"sh", "-c", `printf 'a\033[2Jb' >&2; exit 3`}})
	if err == nil || strings.ContainsRune(err.Error(), 0x1b) {
		t.Errorf("%q", err)
	}
}

// TestNothingOutlivesItsJob: what a tool has left running ends with the cage, in
// its control group too.
func TestNothingOutlivesItsJob(t *testing.T) {
	c := open(t, nil)
	path := image(t, 16<<20)
	k := enter(t, c, path)
	_, err := k.Run(t.Context(), run.Cmd{Args: []string{"sh", "-c", "/inside " + hostileArgument + " hang </image >/dev/null 2>&1 &"}})
	must(t, err)
	must(t, k.Close())
	if who := holding(t, path); len(who) > 0 {
		t.Errorf("processes %v hold the image", who)
	}
	k = enter(t, c, path)
	started := time.Now()
	_, err = k.Run(t.Context(), run.Cmd{Args: []string{"/inside", hostileArgument, "hang"}, Timeout: 300 * time.Millisecond})
	if err == nil || time.Since(started) > 20*time.Second {
		t.Errorf("after %v: %v", time.Since(started), err)
	}
	must(t, k.Close())
	if who := holding(t, path); len(who) > 0 {
		t.Errorf("processes %v hold the image", who)
	}
}

// holding finds processes that have a file open.
func holding(t *testing.T, path string) (pids []string) {
	t.Helper()
	want, err := os.Stat(path)
	must(t, err)
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	must(t, err)
	for _, link := range links {
		if have, err := os.Stat(link); err == nil && os.SameFile(want, have) {
			pids = append(pids, strings.Split(link, "/")[2])
		}
	}
	return pids
}

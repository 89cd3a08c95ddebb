package main_test

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/vhost/frontend"
)

// injected has a thread of a process make a system call that it would not make by
// itself, as one would that has been taken over. The thread waits in the kernel.
type injected struct {
	t   *testing.T
	tid int
	was unix.PtraceRegsAmd64
}

// inject stops a thread that waits in a system call, until the test ends. The calling
// goroutine stays locked to its thread, which is the tracer.
func inject(t *testing.T, pid int) *injected {
	t.Helper()
	runtime.LockOSThread()
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*")
	must(t, err)
	for _, task := range tasks {
		tid, err := strconv.Atoi(filepath.Base(task))
		must(t, err)
		must(t, unix.PtraceAttach(tid))
		var status unix.WaitStatus
		_, err = unix.Wait4(tid, &status, unix.WALL, nil)
		must(t, err)
		i := &injected{t: t, tid: tid}
		must(t, unix.PtraceGetRegsAmd64(tid, &i.was))
		code := make([]byte, 2)
		_, err = unix.PtracePeekText(tid, uintptr(i.was.Rip-2), code)
		if err == nil && code[0] == 0x0f && code[1] == 0x05 && int64(i.was.Orig_rax) >= 0 { // syscall
			return i
		}
		must(t, unix.PtraceDetach(tid))
	}
	t.Fatal("no thread waits in the kernel")
	return nil
}

// call makes a system call and gives its error.
func (i *injected) call(number int, args ...uint64) syscall.Errno {
	i.t.Helper()
	regs := i.was
	regs.Rip -= 2
	regs.Rax, regs.Orig_rax = uint64(number), ^uint64(0) // none is to be restarted
	for n, to := range []*uint64{&regs.Rdi, &regs.Rsi, &regs.Rdx, &regs.R10, &regs.R8, &regs.R9} {
		*to = 0
		if n < len(args) {
			*to = args[n]
		}
	}
	must(i.t, unix.PtraceSetRegsAmd64(i.tid, &regs))
	must(i.t, unix.PtraceSingleStep(i.tid))
	var status unix.WaitStatus
	_, err := unix.Wait4(i.tid, &status, unix.WALL, nil)
	must(i.t, err)
	must(i.t, unix.PtraceGetRegsAmd64(i.tid, &regs))
	if result := int64(regs.Rax); result < 0 && result > -4096 {
		return syscall.Errno(-result)
	}
	return 0
}

// release lets the thread go on where it was.
func (i *injected) release() {
	must(i.t, unix.PtraceSetRegsAmd64(i.tid, &i.was))
	must(i.t, unix.PtraceDetach(i.tid))
	runtime.UnlockOSThread()
}

// TestTakenOverWorkerReachesNothing: a real worker, made to call the kernel as
// somebody would who has taken it over, is refused what it is not for; it serves on
// after that.
func TestTakenOverWorkerReachesNothing(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("registers are those of amd64")
	}
	s, ctx := starter(t, nil), t.Context()
	w, err := s.Serve(ctx, flat(t, blockdev.VhostUser))
	must(t, err)
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	g.good(frontend.Read, 0, block)
	i := inject(t, w.Pid())
	sp := i.was.Rsp &^ 15 // readable memory, for calls that look at it
	const atFDCWD = ^uint64(99)
	for _, c := range []struct {
		name   string
		number int
		args   []uint64
	}{
		{"open", unix.SYS_OPEN, []uint64{sp, 0}},
		{"openat", unix.SYS_OPENAT, []uint64{atFDCWD, sp, 0}},
		{"openat2", unix.SYS_OPENAT2, []uint64{atFDCWD, sp, sp, 24}},
		{"socket(AF_INET)", unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_STREAM}},
		{"socket(AF_UNIX)", unix.SYS_SOCKET, []uint64{unix.AF_UNIX, unix.SOCK_STREAM}},
		{"socket(AF_NETLINK)", unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW}},
		{"connect", unix.SYS_CONNECT, []uint64{0, sp, 16}},
		{"execve", unix.SYS_EXECVE, []uint64{sp, 0, 0}},
		{"execveat", unix.SYS_EXECVEAT, []uint64{atFDCWD, sp, 0, 0, 0}},
		{"fork", unix.SYS_FORK, nil},
		{"clone of a process", unix.SYS_CLONE, []uint64{uint64(unix.SIGCHLD)}},
		{"clone3", unix.SYS_CLONE3, []uint64{sp, 88}},
		{"ptrace", unix.SYS_PTRACE, []uint64{unix.PTRACE_ATTACH, uint64(os.Getpid())}},
		{"process_vm_readv", unix.SYS_PROCESS_VM_READV, []uint64{uint64(os.Getpid())}},
		{"kill", unix.SYS_KILL, []uint64{uint64(os.Getpid()), 0}},
		{"tgkill of another", unix.SYS_TGKILL, []uint64{uint64(os.Getpid()), uint64(os.Getpid()), 0}},
		{"pidfd_open", unix.SYS_PIDFD_OPEN, []uint64{uint64(os.Getpid())}},
		{"mount", unix.SYS_MOUNT, []uint64{sp, sp, sp}},
		{"unshare", unix.SYS_UNSHARE, []uint64{unix.CLONE_NEWUSER}},
		{"setns", unix.SYS_SETNS, []uint64{0}},
		{"chroot", unix.SYS_CHROOT, []uint64{sp}},
		{"setuid", unix.SYS_SETUID, []uint64{0}},
		{"prlimit64", unix.SYS_PRLIMIT64, []uint64{0, unix.RLIMIT_DATA}},
		{"mprotect to code", unix.SYS_MPROTECT, []uint64{sp &^ 4095, 4096, unix.PROT_READ | unix.PROT_EXEC}},
		{"mmap of code", unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS}},
		{"bpf", unix.SYS_BPF, nil},
		{"keyctl", unix.SYS_KEYCTL, nil},
		{"unlink", unix.SYS_UNLINK, []uint64{sp}},
		{"ioctl(TIOCSTI)", unix.SYS_IOCTL, []uint64{0, unix.TIOCSTI, sp}},
		{"prctl(PR_SET_DUMPABLE)", unix.SYS_PRCTL, []uint64{unix.PR_SET_DUMPABLE, 1}},
	} {
		if errno := i.call(c.number, c.args...); errno != syscall.EPERM {
			t.Errorf("%s: %v (%d)", c.name, errno, errno)
		}
	}
	if errno := i.call(unix.SYS_GETPID); errno != 0 { // that calls are made at all
		t.Errorf("getpid: %v", errno)
	}
	i.release()
	namespaces(t, w.Pid())
	if root, err := os.Readlink("/proc/" + strconv.Itoa(w.Pid()) + "/root"); err != nil || filepath.Base(root) != "root" || filepath.Base(filepath.Dir(root)) != string(volumeID) {
		t.Errorf("its root is %s, %v", root, err)
	}
	g.good(frontend.Read, 0, block)
	must(t, w.Stop(ctx))
}

// namespaces checks that a worker has no network of ours, and what an io_uring could
// do in its stead comes to nothing.
func namespaces(t *testing.T, pid int) {
	t.Helper()
	for _, name := range []string{"net", "ipc"} {
		ours, err := os.Readlink("/proc/self/ns/" + name)
		must(t, err)
		its, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/" + name)
		must(t, err)
		if ours == its {
			t.Errorf("it shares our %s namespace", name)
		}
	}
	entries, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/root")
	if err != nil || len(entries) > 0 {
		t.Errorf("its root has %v, %v", entries, err)
	}
}

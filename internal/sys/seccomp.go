package sys

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// servingCalls are the system calls of a process that serves open files over open
// sockets, and of Go's runtime below it. It opens, makes, renames, maps and runs
// nothing by name, and knows no other process.
var servingCalls = []uint32{
	unix.SYS_IO_URING_ENTER, unix.SYS_FUTEX, unix.SYS_READ, unix.SYS_WRITE, unix.SYS_EPOLL_PWAIT, unix.SYS_NANOSLEEP,
	unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_PREADV, unix.SYS_PWRITEV, unix.SYS_READV, unix.SYS_WRITEV,
	unix.SYS_FDATASYNC, unix.SYS_FSYNC, unix.SYS_FALLOCATE, unix.SYS_FTRUNCATE, unix.SYS_LSEEK, unix.SYS_FSTAT, unix.SYS_FSTATFS, unix.SYS_STATX,
	unix.SYS_RECVFROM, unix.SYS_SENDTO, unix.SYS_RECVMSG, unix.SYS_SENDMSG, unix.SYS_ACCEPT4, unix.SYS_LISTEN, unix.SYS_SHUTDOWN,
	unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT, unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME,
	unix.SYS_CLOSE, unix.SYS_FCNTL, unix.SYS_DUP, unix.SYS_EVENTFD2, unix.SYS_MEMFD_CREATE, unix.SYS_PIPE2,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_REGISTER,
	unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_BRK,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL,
	unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETRANDOM,
	unix.SYS_CLOCK_GETTIME, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_UNAME,
}

// rule allows a call whose argument, cut by the mask, has a value. Of the argument
// only the lower half is looked at: flags, numbers and requests are there.
type rule struct {
	call, argument, mask, value uint32
}

const (
	newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
	prSetVMA      = 0x53564d41 // PR_SET_VMA, by which Go names its memory
	allBits       = 0xffffffff
)

func servingRules(network bool) []rule {
	rules := []rule{
		{unix.SYS_CLONE, 0, unix.CLONE_THREAD | newNamespaces, unix.CLONE_THREAD}, // threads
		{unix.SYS_MMAP, 2, unix.PROT_EXEC, 0},                                     // no new code
		{unix.SYS_MPROTECT, 2, unix.PROT_EXEC, 0},
		{unix.SYS_TGKILL, 0, allBits, uint32(os.Getpid())}, // Go wakes its own threads
		{unix.SYS_PRCTL, 0, allBits, prSetVMA},
	}
	for _, request := range []uint32{unix.BLKGETSIZE64, unix.BLKSSZGET, unix.BLKPBSZGET, unix.BLKDISCARD, unix.BLKZEROOUT, fsIocFiemap, unix.FICLONERANGE} {
		rules = append(rules, rule{unix.SYS_IOCTL, 1, allBits, request})
	}
	if network {
		rules = append(rules, rule{unix.SYS_SOCKET, 0, allBits, unix.AF_INET}, rule{unix.SYS_SOCKET, 0, allBits, unix.AF_INET6}, rule{unix.SYS_CONNECT, 0, 0, 0})
	}
	return rules
}

// Offsets in struct seccomp_data.
const (
	seccompCall = 0
	seccompArch = 4
	seccompArgs = 16
)

// ServeOnly keeps this process, for ever and with all of its threads, from every
// system call that is not one of a process that serves open files (seccomp(2)): it
// fails with EPERM. network allows connections by IPv4 and IPv6 as well. What an
// io_uring does is not seen by it. errors.ErrUnsupported on a processor that it does
// not know. It needs, and sets, "no new privileges".
func ServeOnly(network bool) error {
	arch, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("seccomp on %s: %w", runtime.GOARCH, errors.ErrUnsupported)
	}
	if err := GainNothing(); err != nil {
		return err
	}
	filter := servingFilter(arch, network)
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: unsafe.SliceData(filter)}
	const setModeFilter, syncThreads = 1, 1
	other, _, errno := unix.Syscall(unix.SYS_SECCOMP, setModeFilter, syncThreads, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	if other != 0 {
		return fmt.Errorf("seccomp: thread %d has a filter of its own", other)
	}
	return nil
}

// servingFilter is the program: each line below is a comparison with what follows
// it, so that no jump is long. The kernel remembers which calls are allowed whatever
// their arguments, and does not run it for those.
func servingFilter(arch uint32, network bool) []unix.SockFilter {
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	unless := func(value uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: skip, K: value}
	}
	end := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	f := []unix.SockFilter{load(seccompArch), unless(arch, 1), {Code: unix.BPF_JMP | unix.BPF_JA, K: 1}, end(unix.SECCOMP_RET_KILL_PROCESS), load(seccompCall)}
	for _, call := range servingCalls {
		f = append(f, unless(call, 1), end(unix.SECCOMP_RET_ALLOW))
	}
	for _, r := range servingRules(network) {
		f = append(f, load(seccompCall), unless(r.call, 4), load(seccompArgs+8*r.argument),
			unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: r.mask}, unless(r.value, 1), end(unix.SECCOMP_RET_ALLOW))
	}
	return append(f, end(unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM)))
}

// LimitSelf bounds what this process may have: bytes of memory of its own
// (RLIMIT_DATA), open descriptors, and no dump of its memory when it crashes.
func LimitSelf(data uint64, files uint64) error {
	for _, one := range []struct {
		resource int
		value    uint64
	}{{unix.RLIMIT_DATA, data}, {unix.RLIMIT_NOFILE, files}, {unix.RLIMIT_CORE, 0}} {
		if err := unix.Setrlimit(one.resource, &unix.Rlimit{Cur: one.value, Max: one.value}); err != nil {
			return os.NewSyscallError("setrlimit", err)
		}
	}
	return nil
}

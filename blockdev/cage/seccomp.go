package cage

import (
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// allowed are the system calls of filesystem tools, of the C library below them
// (threads, memory, time) and of the process of ours inside. Everything else does
// not exist in a cage (ENOSYS): no socket, mount, namespace, keyring, tracing,
// another process's memory, BPF, io_uring, device node, module or clock.
const allowed = `
	access arch_prctl brk chdir clock_getres clock_gettime clock_nanosleep close close_range copy_file_range
	dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2
	execve exit exit_group faccessat faccessat2 fadvise64 fallocate fcntl fdatasync fgetxattr flistxattr flock
	fstat fstatfs fsync ftruncate futex futex_waitv getcwd getdents getdents64 getegid geteuid getgid getgroups
	getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid
	gettimeofday getuid getxattr kill lgetxattr listxattr llistxattr lseek lstat madvise mincore mlock
	mmap mprotect mremap msync munlock munmap nanosleep newfstatat open openat pause pipe pipe2 poll ppoll
	prctl pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read readahead readlink
	readlinkat readv restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
	rt_sigreturn rt_sigsuspend rt_sigtimedwait sched_get_priority_max sched_get_priority_min
	sched_getaffinity sched_getparam sched_getscheduler sched_setaffinity sched_yield select set_robust_list
	get_robust_list set_tid_address setitimer setpgid setpriority setsid sigaltstack splice stat
	statfs statx sync_file_range sync syncfs sysinfo tgkill time timer_create timer_delete timer_getoverrun
	timer_gettime timer_settime times tkill truncate umask uname unlink unlinkat vfork wait4 waitid write writev
	membarrier pidfd_open pidfd_send_signal`

// cloneNew are the flags of clone(2) that make namespaces: CLONE_NEWNS, NEWCGROUP,
// NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET. clone3 takes its flags from memory,
// where no filter sees them, so it does not exist, and the C library uses clone.
const cloneNew = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

// ioctls are what tools ask of an image, a block device or a terminal, by
// linux/fs.h, linux/fiemap.h, linux/blkzoned.h, asm-generic/ioctls.h and xfsprogs'
// xfs_fs.h. No other call of the filesystem that holds the image can be made.
var ioctls = []uint64{
	0x125e,     // BLKROGET
	0x1260,     // BLKGETSIZE
	0x1261,     // BLKFLSBUF
	0x1268,     // BLKSSZGET
	0x1277,     // BLKDISCARD
	0x1278,     // BLKIOMIN
	0x1279,     // BLKIOOPT
	0x127a,     // BLKALIGNOFF
	0x127b,     // BLKPBSZGET
	0x127c,     // BLKDISCARDZEROES
	0x127e,     // BLKROTATIONAL
	0x127f,     // BLKZEROOUT
	0x80081270, // BLKBSZGET
	0x80081272, // BLKGETSIZE64
	0x80041284, // BLKGETZONESZ
	0xc020660b, // FS_IOC_FIEMAP
	0x80086601, // FS_IOC_GETFLAGS
	0x5401,     // TCGETS
	0x5413,     // TIOCGWINSZ
	0x541b,     // FIONREAD
	0x800c581e, // XFS_IOC_DIOINFO
	0x80705864, // XFS_IOC_FSGEOMETRY_V1
	0x8100587e, // XFS_IOC_FSGEOMETRY
}

// fileSize is RLIMIT_FSIZE, which bounds the image. xfs_repair raises it for image
// files and gives up when it cannot: it is told that it could.
const fileSize = 1

// narrowed are the rules for calls that are allowed with some arguments only.
func narrowed() []specs.LinuxSyscall {
	when := func(index uint, op specs.LinuxSeccompOperator, value uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: index, Op: op, Value: value}
	}
	done := uint(0)
	var rules []specs.LinuxSyscall
	for _, request := range ioctls {
		rules = append(rules, specs.LinuxSyscall{Names: []string{"ioctl"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{when(1, specs.OpEqualTo, request)}})
	}
	return append(rules, []specs.LinuxSyscall{
		{Names: []string{"setrlimit"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{when(0, specs.OpNotEqual, fileSize)}},
		{Names: []string{"setrlimit"}, Action: specs.ActErrno, ErrnoRet: &done, Args: []specs.LinuxSeccompArg{when(0, specs.OpEqualTo, fileSize)}},
		{Names: []string{"prlimit64"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{when(1, specs.OpNotEqual, fileSize)}},
		{Names: []string{"prlimit64"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{when(1, specs.OpEqualTo, fileSize), when(2, specs.OpEqualTo, 0)}},
		{Names: []string{"prlimit64"}, Action: specs.ActErrno, ErrnoRet: &done, Args: []specs.LinuxSeccompArg{when(1, specs.OpEqualTo, fileSize), when(2, specs.OpNotEqual, 0)}},
	}...)
}

func seccomp() *specs.LinuxSeccomp {
	const enosys = 38
	noSuchCall := uint(enosys)
	return &specs.LinuxSeccomp{
		DefaultAction:   specs.ActErrno,
		DefaultErrnoRet: &noSuchCall,
		Syscalls: append(narrowed(), []specs.LinuxSyscall{
			{Names: strings.Fields(allowed), Action: specs.ActAllow},
			{Names: []string{"clone"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: cloneNew, ValueTwo: 0, Op: specs.OpMaskedEqual},
			}},
		}...),
	}
}

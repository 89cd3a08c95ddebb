package sandbox

import (
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// allowedCalls are the system calls that programs in a sandbox may make: those
// of ordinary programs on their own processes, files, memory and sockets. What
// is not here answers EPERM. Left out on purpose: everything that mounts, loads
// or reboots, that changes namespaces, that looks into the kernel or other
// processes' memory from above (bpf, perf, kexec, keyrings, userfaultfd), that
// sets the clock, and io_uring, whose operations no filter sees.
var allowedCalls = strings.Fields(`
	accept accept4 access alarm arch_prctl bind brk
	cachestat capget capset chdir chmod chown clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat
	dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit exit_group
	faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork
	fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat
	get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp
	getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr
	inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit ioctl
	ioprio_get ioprio_set kill
	landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listxattr llistxattr lremovexattr
	lseek lsetxattr lstat
	madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect
	mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
	name_to_handle_at nanosleep newfstatat open openat openat2
	pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64
	process_mrelease pselect6 pwrite64 pwritev pwritev2
	read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr rename renameat renameat2 restart_syscall rmdir
	rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
	sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
	sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop sendfile sendmmsg
	sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid
	setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4
	socketpair splice stat statfs statx symlink symlinkat sync sync_file_range syncfs sysinfo
	tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times
	tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev
`)

// Numbers of the kernel's headers that the filter compares with.
const (
	newNamespaces = 0x7E020000 // CLONE_NEWNS|NEWCGROUP|NEWUTS|NEWIPC|NEWUSER|NEWPID|NEWNET, linux/sched.h
	familyVsock   = 40         // AF_VSOCK: reaches the host from a guest
	familyAlg     = 38         // AF_ALG: the kernel's cryptography, of no use here and often broken
	errnoENOSYS   = 38
	errnoEPERM    = 1
)

// architectures are those whose calls this machine takes.
func architectures() []specs.Arch {
	switch runtime.GOARCH {
	case "amd64":
		return []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32}
	case "arm64":
		return []specs.Arch{specs.ArchAARCH64, specs.ArchARM}
	}
	return nil // the machine's own
}

// seccompFilter is the filter of every sandbox.
func seccompFilter() *specs.LinuxSeccomp {
	eperm, enosys := uint(errnoEPERM), uint(errnoENOSYS)
	allow := func(args []specs.LinuxSeccompArg, names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: specs.ActAllow, Args: args}
	}
	return &specs.LinuxSeccomp{
		DefaultAction:   specs.ActErrno,
		DefaultErrnoRet: &eperm,
		Architectures:   architectures(),
		Syscalls: []specs.LinuxSyscall{
			allow(nil, slices.Clone(allowedCalls)...),
			// Threads and processes, but no new namespace: that would give a tenant
			// all capabilities inside it, and mounts with them.
			allow([]specs.LinuxSeccompArg{{Index: 0, Value: newNamespaces, ValueTwo: 0, Op: specs.OpMaskedEqual}}, "clone"),
			// Its flags are behind a pointer that no filter can follow; libraries
			// fall back to clone on ENOSYS.
			{Names: []string{"clone3"}, Action: specs.ActErrno, ErrnoRet: &enosys},
			// All families but the two: a filter compares with one number at a time.
			allow([]specs.LinuxSeccompArg{{Index: 0, Value: familyAlg, Op: specs.OpLessThan}}, "socket"),
			allow([]specs.LinuxSeccompArg{{Index: 0, Value: familyAlg + 1, Op: specs.OpEqualTo}}, "socket"),
			allow([]specs.LinuxSeccompArg{{Index: 0, Value: familyVsock, Op: specs.OpGreaterThan}}, "socket"),
			// Personalities that only change how programs are shown the machine.
			allow([]specs.LinuxSeccompArg{{Index: 0, Value: 0x0, Op: specs.OpEqualTo}}, "personality"),
			allow([]specs.LinuxSeccompArg{{Index: 0, Value: 0x8, Op: specs.OpEqualTo}}, "personality"),        // PER_LINUX32
			allow([]specs.LinuxSeccompArg{{Index: 0, Value: 0x40000, Op: specs.OpEqualTo}}, "personality"),    // ADDR_NO_RANDOMIZE
			allow([]specs.LinuxSeccompArg{{Index: 0, Value: 0xffffffff, Op: specs.OpEqualTo}}, "personality"), // ask
			// A process may trace its own children: debuggers work, and ptrace has
			// respected seccomp since Linux 4.8.
			allow(nil, "ptrace", "process_vm_readv", "process_vm_writev", "chroot"),
		},
	}
}

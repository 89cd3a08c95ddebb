// Command probe makes system calls that a sandbox must not be able to make, and
// says which of them the kernel let through. It is built and run by a test.
package main

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"
)

// Numbers for x86-64 that package syscall does not have.
const (
	sysSetns            = 308
	sysFinitModule      = 313
	sysBPF              = 321
	sysUserfaultfd      = 323
	sysIOUringSetup     = 425
	sysOpenTree         = 428
	sysMoveMount        = 429
	sysFsopen           = 430
	sysClone3           = 435
	sysMountSetattr     = 442
	sysKexecFileLoad    = 320
	sysOpenByHandle     = 304
	sysPerfEventOpen    = 298
	newUser, newNS      = 0x10000000, 0x00020000
	familyAlg, familyVM = 38, 40
)

func main() {
	path := append([]byte("/tmp"), 0)
	p := uintptr(unsafe.Pointer(&path[0]))
	for _, c := range []struct {
		name string
		args [7]uintptr
	}{
		{"unshare(NEWUSER)", [7]uintptr{syscall.SYS_UNSHARE, newUser}},
		{"unshare(NEWNS)", [7]uintptr{syscall.SYS_UNSHARE, newNS}},
		{"clone(NEWUSER)", [7]uintptr{syscall.SYS_CLONE, newUser | uintptr(syscall.SIGCHLD)}},
		{"clone3", [7]uintptr{sysClone3, 0, 0}},
		{"setns", [7]uintptr{sysSetns, 0, 0}},
		{"mount", [7]uintptr{syscall.SYS_MOUNT, p, p, p, 0, 0}},
		{"umount2", [7]uintptr{syscall.SYS_UMOUNT2, p, 0}},
		{"pivot_root", [7]uintptr{syscall.SYS_PIVOT_ROOT, p, p}},
		{"open_tree", [7]uintptr{sysOpenTree, ^uintptr(99), p, 1}},
		{"move_mount", [7]uintptr{sysMoveMount, 0, p, 0, p, 0}},
		{"fsopen", [7]uintptr{sysFsopen, p, 0}},
		{"mount_setattr", [7]uintptr{sysMountSetattr, 0, p, 0, 0, 0}},
		{"bpf", [7]uintptr{sysBPF, 0, 0, 0}},
		{"perf_event_open", [7]uintptr{sysPerfEventOpen, 0, 0, 0, 0, 0}},
		{"userfaultfd", [7]uintptr{sysUserfaultfd, 0}},
		{"io_uring_setup", [7]uintptr{sysIOUringSetup, 1, 0}},
		{"open_by_handle_at", [7]uintptr{sysOpenByHandle, 0, 0, 0}},
		{"init_module", [7]uintptr{syscall.SYS_INIT_MODULE, 0, 0, p}},
		{"finit_module", [7]uintptr{sysFinitModule, 0, p, 0}},
		{"delete_module", [7]uintptr{syscall.SYS_DELETE_MODULE, p, 0}},
		{"kexec_load", [7]uintptr{syscall.SYS_KEXEC_LOAD, 0, 0, 0, 0}},
		{"kexec_file_load", [7]uintptr{sysKexecFileLoad, 0, 0, 0, p, 0}},
		{"reboot", [7]uintptr{syscall.SYS_REBOOT, 0, 0, 0, 0}},
		{"swapon", [7]uintptr{syscall.SYS_SWAPON, p, 0}},
		{"acct", [7]uintptr{syscall.SYS_ACCT, 0}},
		{"quotactl", [7]uintptr{syscall.SYS_QUOTACTL, 0, p, 0, 0}},
		{"settimeofday", [7]uintptr{syscall.SYS_SETTIMEOFDAY, 0, 0}},
		{"clock_settime", [7]uintptr{syscall.SYS_CLOCK_SETTIME, 0, 0}},
		{"sethostname", [7]uintptr{syscall.SYS_SETHOSTNAME, p, 1}},
		{"syslog", [7]uintptr{syscall.SYS_SYSLOG, 3, 0, 0}},
		{"add_key", [7]uintptr{syscall.SYS_ADD_KEY, p, p, p, 1, 0}},
		{"keyctl", [7]uintptr{syscall.SYS_KEYCTL, 0, 0, 0, 0, 0}},
		{"iopl", [7]uintptr{syscall.SYS_IOPL, 3}},
		{"ioperm", [7]uintptr{syscall.SYS_IOPERM, 0, 1, 1}},
		{"lookup_dcookie", [7]uintptr{syscall.SYS_LOOKUP_DCOOKIE, 0, p, 1}},
		{"move_pages", [7]uintptr{syscall.SYS_MOVE_PAGES, 1, 0, 0, 0, 0, 0}},
		{"socket(ALG)", [7]uintptr{syscall.SYS_SOCKET, familyAlg, syscall.SOCK_SEQPACKET, 0}},
		{"socket(VSOCK)", [7]uintptr{syscall.SYS_SOCKET, familyVM, syscall.SOCK_STREAM, 0}},
		{"socket(PACKET)", [7]uintptr{syscall.SYS_SOCKET, syscall.AF_PACKET, syscall.SOCK_RAW, 0}},
		{"personality(READ_IMPLIES_EXEC)", [7]uintptr{syscall.SYS_PERSONALITY, 0x0400000}},
	} {
		a := c.args
		_, _, errno := syscall.RawSyscall6(a[0], a[1], a[2], a[3], a[4], a[5], a[6])
		if errno != syscall.EPERM && errno != syscall.ENOSYS {
			fmt.Printf("%s: %v\n", c.name, errno)
		}
	}
	// What ordinary programs need must go on working.
	if _, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{}); err != nil {
		fmt.Println("start a process:", err)
	}
	if _, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0); err != nil {
		fmt.Println("socket(INET):", err)
	}
	fmt.Println("done")
}

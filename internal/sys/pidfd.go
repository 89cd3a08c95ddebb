package sys

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// OpenPidfd opens a process: the descriptor goes on meaning this process when
// its number is used again. ESRCH (os.ErrProcessDone) when there is none.
func OpenPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK) // so that the runtime can wait for it
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("pidfd_open %d: %w (%w)", pid, os.ErrProcessDone, err)
	case err != nil:
		return nil, fmt.Errorf("pidfd_open %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pid "+strconv.Itoa(pid)), nil
}

// PidfdAlive reports whether the process has not ended; a zombie has.
func PidfdAlive(pidfd *os.File) (bool, error) {
	var ended bool
	err := control(pidfd, func(fd uintptr) (err error) {
		ended, err = pollEnded(fd)
		return err
	})
	return !ended, wrap("poll", pidfd.Name(), err)
}

func pollEnded(pidfd uintptr) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	n, err := 0, error(nil)
	err = retry(func() error { n, err = unix.Poll(fds, 0); return err })
	return n > 0, err
}

// AwaitEnd waits until the process has ended, or ctx has; it holds no thread
// meanwhile.
func AwaitEnd(ctx context.Context, pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	wake := context.AfterFunc(ctx, func() { _ = pidfd.SetReadDeadline(time.Now()) })
	defer wake()
	var asked error
	err = raw.Read(func(fd uintptr) bool {
		var ended bool
		ended, asked = pollEnded(fd)
		return ended || asked != nil
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(asked, err)
}

// KillProcess sends SIGKILL to the process. It has ended already is success.
func KillProcess(pidfd *os.File) error {
	err := control(pidfd, func(fd uintptr) error { return unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return wrap("pidfd_send_signal", pidfd.Name(), err)
}

// StartTime is when a process began, in clock ticks since boot (field 22 of
// proc_pid_stat(5)): together with the pid and the boot it names the process.
// os.ErrProcessDone when there is none.
func StartTime(pid int) (uint64, error) {
	return statField(pid, 22)
}

// Flags of the kernel's include/linux/sched.h.
const (
	exiting  = 0x4  // PF_EXITING
	noExec   = 0x40 // PF_FORKNOEXEC
	tickTime = time.Second / 100
)

// Ending reports whether a process has begun to end (field 9 of proc_pid_stat(5), its
// flags). It has before the kernel closes its files, and its connections with them.
// os.ErrProcessDone when there is none.
func Ending(pid int) (bool, error) {
	flags, err := statField(pid, 9)
	return flags&exiting != 0, err
}

// Starting reports whether a process was forked not longer ago than a time, and has
// executed no program yet: until then it has open what the one that forked it has.
// os.ErrProcessDone when there is none.
func Starting(pid int, within time.Duration) (bool, error) {
	flags, err := statField(pid, 9)
	if err != nil || flags&noExec == 0 {
		return false, err
	}
	began, err := StartTime(pid)
	if err != nil {
		return false, err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return false, os.NewSyscallError("clock_gettime", err)
	}
	return time.Duration(now.Nano())-time.Duration(began)*tickTime <= within, nil //nolint:gosec // less than the time since boot
}

// statField reads a number of /proc/PID/stat.
func statField(pid, number int) (uint64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, fmt.Errorf("status of %d: %w (%w)", pid, os.ErrProcessDone, err)
	}
	if err != nil {
		return 0, err
	}
	return parseStat(string(text), number)
}

// parseStat reads a field from the third on. The second field is the command in
// parentheses, which may itself hold blanks and parentheses.
func parseStat(stat string, number int) (uint64, error) {
	end := strings.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, fmt.Errorf("malformed stat line %q", stat)
	}
	fields := strings.Fields(stat[end+1:]) // from field 3 on
	if len(fields) <= number-3 {
		return 0, fmt.Errorf("malformed stat line %q", stat)
	}
	return strconv.ParseUint(fields[number-3], 10, 64)
}

// BootID names this boot of the machine.
func BootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(text)), nil
}

// SignalGroup sends a signal to the process and to all others of its process
// group; os.ErrProcessDone when it has ended. The group is found by the process
// that the descriptor means, so a pid that was used again is never hit. A kernel
// before 6.9 cannot do that: then the signal goes to the process alone.
func SignalGroup(pidfd *os.File, sig unix.Signal) error {
	const processGroup = 1 << 2 // PIDFD_SIGNAL_PROCESS_GROUP, include/uapi/linux/pidfd.h
	err := control(pidfd, func(fd uintptr) error {
		err := unix.PidfdSendSignal(int(fd), sig, nil, processGroup)
		if errors.Is(err, unix.EINVAL) {
			err = unix.PidfdSendSignal(int(fd), sig, nil, 0)
		}
		return err
	})
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %s: %w (%w)", pidfd.Name(), os.ErrProcessDone, err)
	}
	return wrap("pidfd_send_signal", pidfd.Name(), err)
}

package sys

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Peer is the process at the other end of a unix socket: the one that connected, or
// the one that called listen(2), as they were then.
type Peer struct{ Pid, User, Group int }

// PeerOf asks the kernel for it (SO_PEERCRED).
func PeerOf(conn syscall.Conn) (Peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *unix.Ucred
	if controlErr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); controlErr != nil {
		return Peer{}, controlErr
	}
	if err != nil {
		return Peer{}, os.NewSyscallError("getsockopt(SO_PEERCRED)", err)
	}
	return Peer{Pid: int(cred.Pid), User: int(cred.Uid), Group: int(cred.Gid)}, nil
}

// SocketPacketPair gives the two ends of a socket that keeps the bounds of messages
// (SOCK_SEQPACKET) between two processes.
func SocketPacketPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "socket pair"), os.NewFile(uintptr(fds[1]), "socket pair"), nil
}

// BindSocket makes a unix socket (unix.SOCK_STREAM or unix.SOCK_SEQPACKET) at path,
// at which nobody listens yet: connections are refused until somebody does, who is
// the Peer of those that connect.
func BindSocket(path string, kind int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		_ = f.Close() // nothing was said through it
		return nil, &os.PathError{Op: "bind", Path: path, Err: err}
	}
	return f, nil
}

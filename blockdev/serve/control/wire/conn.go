package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// Conn carries messages. It is for one goroutine, but for SetDeadline and Close.
type Conn struct{ *net.UnixConn }

// Call sends a request and its files, which stay the caller's.
func (c Conn) Call(r *Request, files ...*os.File) error {
	r.Version = Version
	if err := r.check(len(files)); err != nil {
		return err
	}
	return c.send(r, files)
}

// Answer sends a reply.
func (c Conn) Answer(r *Reply) error {
	r.Version = Version
	return c.send(r, nil)
}

func (c Conn) send(v any, files []*os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > MaxMessage || len(files) > MaxFiles {
		return fmt.Errorf("%w: a message of %d bytes with %d descriptors", ErrProtocol, len(b), len(files))
	}
	return withDescriptors(files, nil, func(fds []int) error {
		var rights []byte
		if len(fds) > 0 {
			rights = syscall.UnixRights(fds...)
		}
		_, _, err := c.WriteMsgUnix(b, rights, nil)
		return err
	})
}

// withDescriptors lends the descriptors of files, which stay open meanwhile and keep
// their mode.
func withDescriptors(files []*os.File, fds []int, fn func([]int) error) error {
	if len(files) == 0 {
		return fn(fds)
	}
	raw, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = withDescriptors(files[1:], append(fds, int(fd)), fn) })
	return errors.Join(err, inner)
}

// Request takes a request and its files, which are the caller's then. io.EOF when the
// other end has hung up.
func (c Conn) Request() (*Request, []*os.File, error) {
	var r Request
	files, err := c.receive(&r)
	if err != nil {
		return nil, nil, err
	}
	if err := r.check(len(files)); err != nil {
		CloseAll(files)
		return nil, nil, err
	}
	return &r, files, nil
}

// Reply takes a reply.
func (c Conn) Reply() (*Reply, error) {
	var r Reply
	files, err := c.receive(&r)
	if err != nil {
		return nil, err
	}
	CloseAll(files)
	return &r, r.check(len(files))
}

// receive takes one message. Nothing is allocated for it before it is there: who
// connects and is silent costs little.
func (c Conn) receive(v any) ([]*os.File, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var there error
	if err := raw.Read(func(fd uintptr) bool {
		var peek [1]byte
		_, _, there = syscall.Recvfrom(int(fd), peek[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return !errors.Is(there, syscall.EAGAIN) && !errors.Is(there, syscall.EINTR)
	}); err != nil {
		return nil, err
	}
	if there != nil {
		return nil, os.NewSyscallError("recvfrom", there)
	}
	body, control := make([]byte, MaxMessage), make([]byte, syscall.CmsgSpace(4*MaxFiles))
	n, controlled, flags, _, err := c.ReadMsgUnix(body, control)
	if err != nil {
		return nil, err
	}
	files, err := parseRights(control[:controlled])
	switch {
	case err != nil:
	case n == 0 && len(files) == 0:
		err = io.EOF
	case flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0:
		err = fmt.Errorf("%w: a message that is too long", ErrProtocol)
	default:
		err = decode(body[:n], v)
	}
	if err != nil {
		CloseAll(files)
		return nil, err
	}
	return files, nil
}

func decode(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}

// parseRights opens what came beside a message. All of it is opened, so that all of
// it can be closed.
func parseRights(control []byte) (files []*os.File, err error) {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	for n := range messages {
		fds, err := syscall.ParseUnixRights(&messages[n])
		if err != nil {
			continue // no descriptors are in it
		}
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	return files, nil
}

// CloseAll closes files that are of no use.
func CloseAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written through it
	}
}

// Patience bounds how long one end waits for what the other has at hand.
const Patience = 10 * time.Second

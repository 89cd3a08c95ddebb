package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	"holdfast/blockdev/serve/vhost"
	"holdfast/internal/sys"
)

// The descriptors that are handed over.
const (
	imageFD  = 3
	listenFD = 4
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "holdfast-blockd: "+err.Error())
		os.Exit(1)
	}
}

func run() error {
	serial := flag.String("serial", "", "what the guest finds the disk by, up to 20 bytes")
	queues := flag.Int("queues", 1, "queues to offer")
	readOnly := flag.Bool("read-only", false, "refuse writes")
	user := flag.Int("user", -1, "user id to become")
	group := flag.Int("group", -1, "group id to become")
	flag.Parse()
	if flag.NArg() != 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if err := confine(*user, *group); err != nil {
		return err
	}
	image := os.NewFile(imageFD, "image")
	socket := os.NewFile(listenFD, "socket")
	listener, err := net.FileListener(socket)
	if err != nil {
		return fmt.Errorf("descriptor %d is no listening socket: %w", listenFD, err)
	}
	_ = socket.Close() // the listener has its own
	l, ok := listener.(*net.UnixListener)
	if !ok {
		return errors.Join(fmt.Errorf("descriptor %d is no unix socket", listenFD), listener.Close())
	}
	l.SetUnlinkOnClose(false) // the next server listens there
	device, err := vhost.NewFile(image)
	if err != nil {
		return err
	}
	d, err := vhost.New(device, vhost.Options{Serial: *serial, ReadOnly: *readOnly, Queues: *queues, Ended: ended})
	if err != nil {
		return err
	}
	go obey(d, l)
	return d.Serve(l)
}

// confine gives up what is not needed to serve.
func confine(user, group int) error {
	if err := sys.GainNothing(); err != nil {
		return err
	}
	if group >= 0 {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(group)); err != nil {
			return fmt.Errorf("become group %d: %w", group, err)
		}
	}
	if user >= 0 {
		if err := syscall.Setuid(user); err != nil {
			return fmt.Errorf("become user %d: %w", user, err)
		}
	}
	return nil
}

func ended(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "holdfast-blockd: connection: "+err.Error())
	}
}

// obey does what signals ask for.
func obey(d *vhost.Server, l *net.UnixListener) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	for s := range signals {
		var err error
		if s == syscall.SIGHUP {
			err = d.Resized()
		} else {
			err = errors.Join(l.Close(), d.Close())
		}
		if err != nil && !errors.Is(err, net.ErrClosed) {
			fmt.Fprintln(os.Stderr, "holdfast-blockd: "+s.String()+": "+err.Error())
		}
	}
}

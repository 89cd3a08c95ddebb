package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev/attach/guest"
	"holdfast/internal/sys"
)

var version = "unknown"

// portWait is how long the agent waits between two looks for its port: the driver
// may be loaded after it has started.
const portWait = time.Second

func main() {
	port := flag.String("port", guest.Port, "name of the virtio-serial port to listen on; empty: none")
	vsock := flag.Uint("vsock", 0, fmt.Sprintf("vsock port to listen on, too (the daemon asks on %d); 0: none", guest.VsockPort))
	notes := flag.String("notes", "/run/holdfast-guest", "directory of notes about frozen filesystems; it must not outlive a boot")
	shown := flag.Bool("version", false, "print the version and end")
	flag.Parse()
	if *shown {
		fmt.Println(version)
		return
	}
	// The agent is idle nearly always: memory is worth more than its time.
	debug.SetGCPercent(20)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := serve(ctx, *port, uint32(*vsock), *notes); err != nil { //nolint:gosec // a larger number is no port, and fails
		fmt.Fprintln(os.Stderr, "holdfast-guest:", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context, port string, vsock uint32, notes string) error {
	if port == "" && vsock == 0 {
		return errors.New("nothing to listen on: give --port or --vsock")
	}
	s := newServer(notes)
	if err := s.freezes.thawFound(); err != nil {
		return err
	}
	defer s.freezes.thawAll()
	ended := make(chan error, 2)
	if port != "" {
		go func() { ended <- servePort(ctx, s, port) }()
	}
	if vsock != 0 {
		go func() { ended <- serveVsock(s, vsock) }()
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

// servePort answers on a port, and waits for one that is not there yet.
func servePort(ctx context.Context, s *server, name string) error {
	for {
		node, err := findPort(name)
		if err != nil {
			return err
		}
		if node != "" {
			p, err := sys.OpenGuestPort(node)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if err == nil {
				err = s.serve(p)
				p.Close()
				return fmt.Errorf("port %s: %w", name, err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(portWait):
		}
	}
}

// findPort finds a port's node by its name; "" for none.
func findPort(name string) (string, error) {
	files, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return "", err
	}
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == name {
			return "/dev/" + filepath.Base(filepath.Dir(file)), nil
		}
	}
	return "", nil
}

// serveVsock answers the host, and nobody else: a vsock is reached by every process
// of the guest as well.
func serveVsock(s *server, port uint32) error {
	listener, err := sys.ListenVsock(port)
	if err != nil {
		return err
	}
	for {
		conn, from, err := sys.AcceptVsock(listener)
		if err != nil {
			return err
		}
		if from != sys.VsockHost {
			conn.Close()
			continue
		}
		go func() {
			defer conn.Close()
			_ = s.serve(conn) // the host goes when it has its answer
		}()
	}
}

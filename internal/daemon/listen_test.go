package daemon

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestAddressInUse: that somebody has an address is told before anything is begun, and
// costs neither him his socket nor this host the mark that all was in order.
func TestAddressInUse(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "in-use.sock")
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": socket} {
		t.Run(network, func(t *testing.T) {
			l, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			state := filepath.Join(dir, network)
			flags := map[string]string{"state_dir": state, "socket": socket, "listen": "none", "worker": dir + "/none"} // which no daemon starts without
			if network == "tcp" {
				flags["socket"], flags["listen"] = "none", l.Addr().String()
			}
			c, err := Load(Sources{Flags: flags})
			if err != nil {
				t.Fatal(err)
			}
			if err := Serve(t.Context(), c, io.Discard, io.Discard); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("a second daemon: %v", err)
			}
			at := layout{state}
			if _, err := os.Stat(at.host()); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it has begun: %v", err)
			}
			if _, err := os.Stat(at.clean()); err != nil {
				t.Error(err)
			}
			if conn, err := net.Dial(network, l.Addr().String()); err != nil {
				t.Errorf("who has it: %v", err)
			} else {
				conn.Close()
			}
		})
	}
}

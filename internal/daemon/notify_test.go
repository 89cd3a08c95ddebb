package daemon

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

func notifySocket(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", name)
	return conn
}

func receive(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	must(t, conn.SetReadDeadline(time.Now().Add(time.Minute)))
	b := make([]byte, 128)
	n, err := conn.Read(b)
	must(t, err)
	return string(b[:n])
}

func TestNotify(t *testing.T) {
	for name, socket := range map[string]string{
		"path":     filepath.Join(t.TempDir(), "notify"),
		"abstract": "@holdfast-test-" + strconv.Itoa(int(time.Now().UnixNano())),
	} {
		t.Run(name, func(t *testing.T) {
			conn := notifySocket(t, socket)
			must(t, notify("READY=1"))
			if got := receive(t, conn); got != "READY=1" {
				t.Errorf("systemd got %q", got)
			}
		})
	}
}

func TestNotifyWithoutSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	must(t, notify("READY=1"))
}

func TestWatchdogInterval(t *testing.T) {
	for _, c := range []struct {
		usec, pid string
		want      time.Duration
	}{
		{"", "", 0}, {"60000000", "", 30 * time.Second}, {"60000000", "1", 0}, {"x", "", 0}, {"-5", "", 0},
	} {
		t.Setenv("WATCHDOG_USEC", c.usec)
		t.Setenv("WATCHDOG_PID", c.pid)
		if got := watchdogInterval(); got != c.want {
			t.Errorf("WATCHDOG_USEC=%q WATCHDOG_PID=%q: %v, want %v", c.usec, c.pid, got, c.want)
		}
	}
}

// TestWatchdogIsSilentWhileSick: systemd must see that the daemon cannot work.
func TestWatchdogIsSilentWhileSick(t *testing.T) {
	conn := notifySocket(t, filepath.Join(t.TempDir(), "notify"))
	ctx, cancel := context.WithCancel(t.Context())
	sick := errors.New("pool is gone")
	asked, complaints := make(chan struct{}), make(chan error, 100)
	answers := make(chan error, 3)
	answers <- sick
	answers <- sick
	answers <- nil
	done := make(chan struct{})
	go func() {
		defer close(done)
		watchdog(ctx, time.Millisecond, func(context.Context) error {
			select {
			case err := <-answers:
				return err
			default:
				select {
				case asked <- struct{}{}:
				case <-ctx.Done():
				}
				return sick
			}
		}, func(err error) { complaints <- err })
	}()
	<-asked
	cancel()
	<-done
	if got := receive(t, conn); got != "WATCHDOG=1" {
		t.Errorf("systemd got %q", got)
	}
	must(t, conn.SetReadDeadline(time.Now()))
	if n, err := conn.Read(make([]byte, 16)); err == nil {
		t.Errorf("a sign of life of %d bytes came from a sick daemon", n)
	}
	if err := <-complaints; !errors.Is(err, sick) {
		t.Errorf("the log has %v", err)
	}
}

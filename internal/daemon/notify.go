package daemon

import (
	"context"
	"net"
	"os"
	"strconv"
	"time"
)

// notify tells systemd about the service's state, by the protocol of
// sd_notify(3): one datagram to the socket that NOTIFY_SOCKET names. Without
// that variable it does nothing.
func notify(state string) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	// net takes a leading "@" for the abstract namespace, as the protocol does.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte(state))
	return err
}

// watchdogInterval is half of what systemd allows between two signs of life,
// or 0 when it expects none of this process.
func watchdogInterval() time.Duration {
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || usec <= 0 {
		return 0
	}
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	return time.Duration(usec) * time.Microsecond / 2
}

// watchdog gives signs of life until ctx ends, but only while healthy says so:
// a daemon that cannot do its work is restarted by systemd.
func watchdog(ctx context.Context, every time.Duration, healthy func(context.Context) error, log func(error)) {
	if every <= 0 {
		return
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		check, cancel := context.WithTimeout(ctx, every)
		err := healthy(check)
		cancel()
		if err == nil {
			err = notify("WATCHDOG=1")
		}
		if err != nil && ctx.Err() == nil {
			log(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"holdfast/api/client"
	"holdfast/internal/run"
)

// daemon is a holdfastd of our own, on a fresh state directory.
type daemon struct {
	bin, state string
	args       []string
	process    *run.Process
	client     *client.Client
	log        *os.File
}

// startDaemon starts holdfastd and waits until it is ready.
func startDaemon(ctx context.Context, bin, state string, args ...string) (*daemon, error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(filepath.Dir(state), "holdfastd.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	d := &daemon{bin: bin, state: state, args: args, log: log}
	return d, d.start(ctx)
}

func (d *daemon) start(ctx context.Context) error {
	_ = os.Remove(filepath.Join(d.state, "listen")) // of the run before
	args := append([]string{d.bin, "--dev", "--state-dir", d.state, "--listen", "127.0.0.1:0", "--rate-limit", "0"}, d.args...)
	process, err := run.Start(args, d.log, d.log)
	if err != nil {
		return err
	}
	d.process = process
	address, err := d.await(ctx)
	if err != nil {
		return errors.Join(err, d.stop())
	}
	key, err := os.ReadFile(filepath.Join(d.state, "dev.key"))
	if err != nil {
		return err
	}
	d.client, err = client.New(client.Options{URL: "http://" + address + "/v0", Key: strings.TrimSpace(string(key)), Workspace: "main"})
	return err
}

// await waits for the address and for /readyz.
func (d *daemon) await(ctx context.Context) (address string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("the daemon is not ready, see %s: %w", d.log.Name(), ctx.Err())
		case <-d.process.Done():
			return "", fmt.Errorf("the daemon has ended, see %s", d.log.Name())
		case <-tick.C:
		}
		b, err := os.ReadFile(filepath.Join(d.state, "listen"))
		if err != nil {
			continue
		}
		address = strings.TrimSpace(string(b))
		if ready(ctx, address) {
			return address, nil
		}
	}
}

func ready(ctx context.Context, address string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		return false
	}
	answer, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	answer.Body.Close()
	return answer.StatusCode == http.StatusOK
}

func (d *daemon) stop() error {
	if d.process == nil {
		return nil
	}
	err := d.process.Stop(time.Minute)
	d.process = nil
	return err
}

// remove stops the daemon, takes its pool away and deletes the state.
func (d *daemon) remove(ctx context.Context) error {
	err := d.stop()
	_, unprepare := run.Run(ctx, run.Cmd{Args: []string{d.bin, "uninstall", "--state-dir", d.state, "--yes"}})
	return errors.Join(err, unprepare, os.RemoveAll(d.state), d.log.Close())
}

// memoryMiB is the daemon's resident set; cpuTicks its CPU time in clock ticks
// (100 a second; proc(5), stat fields 14 and 15).
func (d *daemon) memoryMiB() float64 {
	var kib float64
	if _, err := fmt.Sscan(field(fmt.Sprintf("/proc/%d/status", d.process.Pid()), "VmRSS"), &kib); err != nil {
		return 0
	}
	return kib / 1024
}

func (d *daemon) cpuTicks() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.process.Pid()))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, err := strconv.ParseInt(fields[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(fields[12], 10, 64)
	return user + system, err
}

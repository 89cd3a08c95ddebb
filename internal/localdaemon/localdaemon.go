package localdaemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/api/client"
	"holdfast/internal/run"
)

// Daemon is a holdfastd in development mode, with a state directory of its own.
type Daemon struct {
	State  string         // directory
	Client *client.Client // of workspace main, as its admin
	URL    string         // base, with /v0
	Key    string

	bin     string
	args    []string
	process *run.Process
	log     *os.File
}

// Start starts the program bin on a state directory, made if it is not there,
// and waits until it is ready. Its log goes to holdfastd.log beside the directory.
func Start(ctx context.Context, bin, state string, args ...string) (*Daemon, error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(filepath.Dir(state), "holdfastd.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	d := &Daemon{State: state, bin: bin, args: args, log: log}
	return d, d.Restart(ctx)
}

// Restart starts the daemon again after Stop.
func (d *Daemon) Restart(ctx context.Context) error {
	_ = os.Remove(filepath.Join(d.State, "listen")) // of the run before
	args := append([]string{d.bin, "--dev", "--state-dir", d.State, "--listen", "127.0.0.1:0", "--rate-limit", "0"}, d.args...)
	process, err := run.Start(args, d.log, d.log)
	if err != nil {
		return err
	}
	d.process = process
	address, err := d.await(ctx)
	if err != nil {
		return errors.Join(err, d.Stop())
	}
	key, err := os.ReadFile(filepath.Join(d.State, "dev.key"))
	if err != nil {
		return err
	}
	d.URL, d.Key = "http://"+address+"/v0", strings.TrimSpace(string(key))
	d.Client, err = client.New(client.Options{URL: d.URL, Key: d.Key, Workspace: "main"})
	return err
}

// await waits for the address and for /readyz.
func (d *Daemon) await(ctx context.Context) (address string, err error) {
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
		b, err := os.ReadFile(filepath.Join(d.State, "listen"))
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

// Stop lets the daemon drain and end. Volumes that are attached stay so.
func (d *Daemon) Stop() error {
	if d.process == nil {
		return nil
	}
	err := d.process.Stop(time.Minute)
	d.process = nil
	return err
}

// Kill ends the daemon without warning (SIGKILL) and waits for its end.
func (d *Daemon) Kill() error {
	if d.process == nil {
		return nil
	}
	if err := syscall.Kill(d.process.Pid(), syscall.SIGKILL); err != nil {
		return err
	}
	<-d.process.Done()
	d.process = nil
	return nil
}

// Remove stops the daemon, unmounts its pool and deletes the state directory.
func (d *Daemon) Remove(ctx context.Context) error {
	err := d.Stop()
	mounted := d.uninstall(ctx)
	if err := errors.Join(err, mounted); err != nil {
		return err // what is mounted must not be deleted
	}
	return errors.Join(os.RemoveAll(d.State), d.log.Close())
}

// uninstall takes the mounts away. A container that another process is starting
// holds a copy of every mount of the host for a moment.
func (d *Daemon) uninstall(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		_, err := run.Run(ctx, run.Cmd{Args: []string{d.bin, "uninstall", "--state-dir", d.State, "--yes"}})
		if err == nil || !strings.Contains(err.Error(), "in use") || strings.Contains(err.Error(), "volumes are mounted") {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// MemoryMiB is the daemon's resident set (proc(5), VmRSS).
func (d *Daemon) MemoryMiB() (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.process.Pid()))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	var kib float64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		return 0, fmt.Errorf("VmRSS: %w", err)
	}
	return kib / 1024, nil
}

// CPUTicks is the daemon's CPU time in clock ticks, 100 a second (proc(5), stat
// fields 14 and 15).
func (d *Daemon) CPUTicks() (int64, error) {
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

package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev/serve/nbd"
	"holdfast/internal/run"
)

// ioPath is a way to the bytes: what fio is told, and who serves.
type ioPath struct {
	name   string
	global []string     // lines of fio's [global] section
	server *run.Process // nil: nobody
	dir    string
}

// ioSample is what one job got on one path.
type ioSample struct {
	iops           float64
	p50, p99, p999 float64 // µs
	server, client float64 // µs of CPU for each request
}

func (s ioSample) rate() float64      { return s.iops }
func (s ioSample) serverCPU() float64 { return s.server }
func (s ioSample) clientCPU() float64 { return s.client }

// start starts the servers of all paths to an image.
func (b *IO) start(ctx context.Context, image string) error {
	program := b.Program
	if program == "" {
		var err error
		if program, err = os.Executable(); err != nil {
			return err
		}
	}
	b.paths = make([]*ioPath, pathCount)
	b.paths[pathRaw] = &ioPath{name: "raw file", dir: b.Dir, global: []string{"ioengine=io_uring", "direct=1", "filename=" + image}}
	for p, server := range map[int]struct {
		name string
		args func(socket string) []string
	}{
		pathNBD: {"NBD", func(socket string) []string {
			return []string{program, "bench", "io", "--serve", image, "--socket", socket}
		}},
		pathQemuNBD: {"qemu-nbd", func(socket string) []string {
			return []string{"qemu-nbd", "--format=raw", "--cache=none", "--aio=io_uring", "--discard=unmap", "--persistent", "--shared=8", "--socket=" + socket, image}
		}},
	} {
		socket := filepath.Join(b.Dir, fmt.Sprintf("%d.sock", p))
		path := &ioPath{name: server.name, dir: b.Dir, global: []string{"ioengine=nbd", "uri=nbd+unix:///?socket=" + socket}}
		b.paths[p] = path
		var err error
		if path.server, err = run.Start(server.args(socket), os.Stderr, os.Stderr); err != nil {
			return err
		}
		if err := path.answers(ctx, socket); err != nil {
			return err
		}
	}
	return nil
}

// answers waits until somebody listens on a socket.
func (p *ioPath) answers(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-p.server.Done():
			return fmt.Errorf("%s has ended: %w", p.name, err)
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", p.name, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// stop ends the servers.
func (b *IO) stop() error {
	var errs []error
	for _, p := range b.paths {
		if p != nil && p.server != nil {
			errs = append(errs, p.server.Stop(10*time.Second))
		}
	}
	return errors.Join(errs...)
}

// run runs a job on a path.
func (p *ioPath) run(ctx context.Context, job string, each time.Duration, size int64) (s ioSample, err error) {
	text, err := jobFiles.ReadFile("jobs/" + job + ".fio")
	if err != nil {
		return s, err
	}
	global := append([]string{"[global]", "time_based=1", fmt.Sprintf("runtime=%dms", each.Milliseconds()), fmt.Sprintf("size=%d", size), "randrepeat=0"}, p.global...)
	file, out := filepath.Join(p.dir, "job.fio"), filepath.Join(p.dir, "job.json")
	if err := os.WriteFile(file, []byte(strings.Join(global, "\n")+"\n"+string(text)), 0o600); err != nil {
		return s, err
	}
	before, err := p.cpu()
	if err != nil {
		return s, err
	}
	// fio's NBD engine talks on the standard output.
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"fio", "--output-format=json", "--output=" + out, file}, Dir: p.dir, Timeout: each + time.Minute}); err != nil {
		return s, err
	}
	after, err := p.cpu()
	if err != nil {
		return s, err
	}
	return readFio(out, after-before)
}

// readFio reads fio's report; cpu is what the server took, in µs.
func readFio(path string, cpu float64) (s ioSample, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	type way struct {
		IOPS     float64 `json:"iops"`
		Requests float64 `json:"total_ios"`
		Latency  struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error   int     `json:"error"`
			Read    way     `json:"read"`
			Write   way     `json:"write"`
			Runtime float64 `json:"job_runtime"` // ms
			User    float64 `json:"usr_cpu"`     // %
			System  float64 `json:"sys_cpu"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(text, &report); err != nil || len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return s, fmt.Errorf("fio's report: %w: %.200q", err, text)
	}
	j := report.Jobs[0]
	requests := j.Read.Requests + j.Write.Requests
	if requests == 0 {
		return s, errors.New("fio made no request")
	}
	most := j.Read // of a mixture, the larger part stands for the latency
	if j.Write.Requests > j.Read.Requests {
		most = j.Write
	}
	at := func(percentile string) float64 { return most.Latency.Percentile[percentile] / 1000 }
	return ioSample{
		iops: j.Read.IOPS + j.Write.IOPS, p50: at("50.000000"), p99: at("99.000000"), p999: at("99.900000"),
		server: cpu / requests, client: (j.User + j.System) / 100 * j.Runtime * 1000 / requests,
	}, nil
}

// cpu is what the server has taken so far in µs, to a hundredth of a second
// (proc_pid_stat(5)).
func (p *ioPath) cpu() (float64, error) {
	if p.server == nil {
		return 0, nil
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.server.Pid()))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("stat of %s: %q", p.name, text)
	}
	user, err := strconv.ParseFloat(fields[11], 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseFloat(fields[12], 64)
	return (user + system) * 10_000, err
}

// ServeNBD serves an image on a unix socket until ctx ends: the server that is
// measured, in a process of its own.
func ServeNBD(ctx context.Context, image, socket string) (err error) {
	f, err := os.OpenFile(image, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	d, err := nbd.NewFile(f)
	if err != nil {
		return err
	}
	e, err := nbd.NewExport("", d, nbd.ExportOptions{Size: info.Size()})
	if err != nil {
		return err
	}
	s := nbd.NewServer(nbd.Options{})
	if err := s.Add(e); err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	return s.Serve(l)
}

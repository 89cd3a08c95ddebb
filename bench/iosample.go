package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// ioSample is what one job got on one path in one round.
type ioSample struct {
	iops           float64
	p50, p99, p999 float64 // µs
	server, client float64 // µs of CPU for each request
	machine        float64 // likewise of the whole machine, whoever took it
}

func (s ioSample) rate() float64       { return s.iops }
func (s ioSample) serverCPU() float64  { return s.server }
func (s ioSample) clientCPU() float64  { return s.client }
func (s ioSample) machineCPU() float64 { return s.machine }

// valuesOf takes one figure of each sample.
func valuesOf(samples []ioSample, of func(ioSample) float64) []float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	return values
}

func medianOf(samples []ioSample, of func(ioSample) float64) float64 {
	m, _, _ := medianWithin(valuesOf(samples, of))
	return m
}

func latenciesOf(samples []ioSample) *Latency {
	return &Latency{
		P50:  medianOf(samples, func(s ioSample) float64 { return s.p50 }),
		P99:  medianOf(samples, func(s ioSample) float64 { return s.p99 }),
		P999: medianOf(samples, func(s ioSample) float64 { return s.p999 }),
	}
}

// readFio reads fio's report; the client's CPU is what fio says of its job.
func readFio(path string, flushes bool) (s ioSample, requests float64, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return s, 0, err
	}
	samples, err := parseFio(text, flushes)
	if err != nil {
		return s, 0, err
	}
	return samples[0].ioSample, samples[0].requests, nil
}

// fioSample is what one of fio's jobs got, and by how many requests.
type fioSample struct {
	ioSample
	requests float64
}

// fioWay is one kind of requests of a job.
type fioWay struct {
	IOPS     float64        `json:"iops"`
	Requests float64        `json:"total_ios"`
	Latency  fioPercentiles `json:"clat_ns"`
}

type fioPercentiles struct {
	Percentile map[string]float64 `json:"percentile"`
}

// fioJob is a job in fio's report.
type fioJob struct {
	Error int    `json:"error"`
	Read  fioWay `json:"read"`
	Write fioWay `json:"write"`
	Sync  struct {
		Latency fioPercentiles `json:"lat_ns"`
	} `json:"sync"`
	Runtime float64 `json:"job_runtime"` // ms
	User    float64 `json:"usr_cpu"`     // %
	System  float64 `json:"sys_cpu"`
}

// parseFio reads fio's report of as many jobs as there are flags, which tell of which
// the flushes count.
func parseFio(text []byte, flushes ...bool) ([]fioSample, error) {
	var report struct {
		Jobs []fioJob `json:"jobs"`
	}
	if err := json.Unmarshal(text, &report); err != nil || len(report.Jobs) != len(flushes) {
		return nil, fmt.Errorf("fio's report: %d jobs, %w: %.200q", len(report.Jobs), err, text)
	}
	samples := make([]fioSample, len(flushes))
	for i, j := range report.Jobs {
		var err error
		if samples[i], err = j.sample(flushes[i]); err != nil {
			return nil, err
		}
	}
	return samples, nil
}

func (j fioJob) sample(flushes bool) (s fioSample, err error) {
	if j.Error != 0 {
		return s, fmt.Errorf("fio's job failed: error %d", j.Error)
	}
	s.requests = j.Read.Requests + j.Write.Requests
	if s.requests == 0 {
		return s, errors.New("fio made no request")
	}
	most := j.Read.Latency // of a mixture, the larger part stands for the latency
	if j.Write.Requests > j.Read.Requests {
		most = j.Write.Latency
	}
	if flushes {
		most = j.Sync.Latency
	}
	at := func(percentile string) float64 { return most.Percentile[percentile] / 1000 }
	s.ioSample = ioSample{
		iops: j.Read.IOPS + j.Write.IOPS, p50: at("50.000000"), p99: at("99.000000"), p999: at("99.900000"),
		client: (j.User + j.System) / 100 * j.Runtime * 1000 / s.requests,
	}
	return s, nil
}

// cpuOf is what a process has taken so far in µs, to a hundredth of a second
// (proc_pid_stat(5)).
func cpuOf(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("stat of process %d: %q", pid, text)
	}
	user, err := strconv.ParseFloat(fields[11], 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseFloat(fields[12], 64)
	return (user + system) * 10_000, err
}

// machineCPU is what everything on this machine has taken so far in µs, the
// kernel's own threads and interrupts included (proc_stat(5)).
func machineCPU() (float64, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	var user, nice, system, idle, iowait, irq, softirq float64
	if _, err := fmt.Sscanf(string(text), "cpu %f %f %f %f %f %f %f", &user, &nice, &system, &idle, &iowait, &irq, &softirq); err != nil {
		return 0, fmt.Errorf("/proc/stat: %w", err)
	}
	return (user + nice + system + irq + softirq) * 10_000, nil
}

// ownCPU is what this process has taken so far in µs.
func ownCPU() (float64, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0, os.NewSyscallError("getrusage", err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1000, nil
}

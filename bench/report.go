package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
)

// Report is one run of the bench.
type Report struct {
	Name  string    `json:"name"`
	Time  time.Time `json:"time"`
	Host  Host      `json:"host"`
	Rows  []Row     `json:"rows"`
	Notes []string  `json:"notes,omitempty"`
}

// Host are the facts without which a figure means nothing.
type Host struct {
	Kernel         string `json:"kernel"`
	CPUs           int    `json:"cpus"`
	CPU            string `json:"cpu"`
	MemoryMiB      int64  `json:"memoryMiB"`
	StateDirectory string `json:"stateDirectory"` // filesystem type below
	Go             string `json:"go"`
	LoadBefore     string `json:"loadBefore"`
	LoadAfter      string `json:"loadAfter"`
}

// Row is one measure. Values are in Unit.
type Row struct {
	Measure   string  `json:"measure"`
	Unit      string  `json:"unit"`
	Samples   int     `json:"samples"`
	P50       float64 `json:"p50"`
	P99       float64 `json:"p99,omitempty"`
	Goal      string  `json:"goal,omitempty"`
	Met       bool    `json:"met"`
	Yardstick string  `json:"yardstick,omitempty"`
	Beside    float64 `json:"beside,omitempty"` // the yardstick's median
	Ratio     float64 `json:"ratio,omitempty"`  // ours to the yardstick, median of the rounds
	Note      string  `json:"note,omitempty"`

	// Of a load on a path to a volume's bytes; for charts and comparisons.
	Job           string   `json:"job,omitempty"`
	Path          string   `json:"path,omitempty"`
	Against       string   `json:"against,omitempty"` // the yardstick's path
	Least         float64  `json:"least,omitempty"`   // goal for Ratio, where it is one
	Low           float64  `json:"low,omitempty"`     // the 95 % interval of Ratio
	High          float64  `json:"high,omitempty"`
	Latency       *Latency `json:"latency,omitempty"`
	BesideLatency *Latency `json:"besideLatency,omitempty"`
	CPU           *CPU     `json:"cpu,omitempty"`
	BesideCPU     *CPU     `json:"besideCPU,omitempty"`
}

// Latency is how long requests took, in µs; each is the median of the rounds.
type Latency struct {
	P50  float64 `json:"p50"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p999"`
}

func (l *Latency) String() string { return fmt.Sprintf("%.0f/%.0f/%.0f µs", l.P50, l.P99, l.P999) }

// CPU is what a request cost, in µs; each is the median of the rounds.
type CPU struct {
	Server  float64 `json:"server"`
	Client  float64 `json:"client"`
	Machine float64 `json:"machine"` // all of the machine's, the kernel's own threads and other programs included
}

func (c *CPU) String() string {
	return fmt.Sprintf("%.1f + %.1f, machine %.1f µs", c.Server, c.Client, c.Machine)
}

// Missed counts rows that have a goal and miss it.
func (r Report) Missed() int {
	missed := 0
	for _, row := range r.Rows {
		if row.Goal != "" && !row.Met {
			missed++
		}
	}
	return missed
}

// JSON writes the report for machines.
func (r Report) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// Markdown writes the report for people.
func (r Report) Markdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n\n%s. Kernel %s, %d CPUs (%s), %d MiB of memory, %s, state directory on %s, load %s before and %s after.\n\n",
		r.Name, r.Time.Format("2006-01-02 15:04 MST"), r.Host.Kernel, r.Host.CPUs, r.Host.CPU, r.Host.MemoryMiB, r.Host.Go, r.Host.StateDirectory, r.Host.LoadBefore, r.Host.LoadAfter)
	fmt.Fprintln(&b, "The machine is shared: read the ratios. Each round takes one sample of ours and one of the yardstick.")
	fmt.Fprintln(&b)
	fmt.Fprintln(&b, "| measure | p50 | p99 | goal | met | yardstick in the same rounds | its p50 | ratio | samples |")
	fmt.Fprintln(&b, "|---|---|---|---|---|---|---|---|---|")
	for _, row := range r.Rows {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s | %d |\n", row.Measure, figure(row.P50, row.Unit), figure(row.P99, row.Unit),
			row.Goal, met(row), row.Yardstick, figure(row.Beside, row.Unit), ratio(row.Ratio), row.Samples)
	}
	for _, row := range r.Rows {
		if row.Note != "" {
			fmt.Fprintf(&b, "\n- **%s**: %s", row.Measure, row.Note)
		}
	}
	for _, note := range r.Notes {
		fmt.Fprintf(&b, "\n- %s", note)
	}
	fmt.Fprintln(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

func figure(v float64, unit string) string {
	switch {
	case v == 0 && unit == "ticks":
		return "0 ticks"
	case v == 0:
		return ""
	case v >= 100:
		return fmt.Sprintf("%.0f %s", v, unit)
	default:
		return fmt.Sprintf("%.2f %s", v, unit)
	}
}

func ratio(v float64) string {
	switch {
	case v == 0:
		return ""
	case v < 0.1:
		return fmt.Sprintf("%.4f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func met(r Row) string {
	switch {
	case r.Goal == "":
		return ""
	case r.Met:
		return "yes"
	}
	return "**no**"
}

// milliseconds is a duration as rows have it.
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func hostFacts(dir string) Host {
	h := Host{CPUs: runtime.NumCPU(), Go: runtime.Version(), LoadBefore: load()}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		h.Kernel = strings.TrimSpace(string(b))
	}
	h.CPU = field("/proc/cpuinfo", "model name")
	var kib int64
	if _, err := fmt.Sscan(field("/proc/meminfo", "MemTotal"), &kib); err == nil {
		h.MemoryMiB = kib / 1024
	}
	if mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(dir)); err == nil {
		deepest := 0
		for _, m := range mounts {
			if len(m.Mountpoint) > deepest {
				deepest, h.StateDirectory = len(m.Mountpoint), m.FSType
			}
		}
	}
	return h
}

func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	return strings.Fields(string(b))[0]
}

// field reads a "key : value" line of a file in /proc.
func field(path, key string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

package bench

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The marks in docs/performance.md between which the page is written.
const (
	pageBegin = "<!-- holdfast bench page: begin -->"
	pageEnd   = "<!-- holdfast bench page: end -->"
)

// ErrNoMarks is what a page without the two marks is.
var ErrNoMarks = errors.New("the page has no marks to write between")

// pageReports are the reports that the page is made of, and their commands.
var pageReports = []struct{ file, command string }{
	{"io-bench", "holdfast bench io"}, {"io-guest-bench", "holdfast bench io --guest"}, {"overlay-bench", "holdfast bench overlay"}, {"worker-bench", "holdfast bench worker"},
}

// WritePage makes charts of the reports in dir and rewrites the part of
// dir/performance.md that is between the marks. A report that is not there is said
// to be missing. It takes no measure.
func WritePage(dir string) error {
	path := filepath.Join(dir, "performance.md")
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	head, rest, found := strings.Cut(string(page), pageBegin)
	_, tail, ended := strings.Cut(rest, pageEnd)
	if !found || !ended {
		return fmt.Errorf("%s: %w", path, ErrNoMarks)
	}
	reports := map[string]Report{}
	for _, r := range pageReports {
		report, err := ReadReport(filepath.Join(dir, r.file+".json"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err == nil {
			reports[r.file] = report
		}
	}
	var b strings.Builder
	b.WriteString(head + pageBegin + "\n")
	writeGoals(&b, reports)
	for _, c := range pageCharts(reports["io-bench"]) {
		if err := os.WriteFile(filepath.Join(dir, c.file), c.svg(), 0o644); err != nil { //nolint:gosec // for everybody
			return err
		}
		fmt.Fprintf(&b, "\n![%s](%s)\n", c.title, c.file)
	}
	b.WriteString(pageEnd + tail)
	return os.WriteFile(path, []byte(b.String()), 0o644) //nolint:gosec // for everybody
}

// writeGoals writes the tables of goals: jobs by pairs of paths, then all others.
func writeGoals(b *strings.Builder, reports map[string]Report) {
	for _, r := range pageReports {
		report, ok := reports[r.file]
		if !ok {
			fmt.Fprintf(b, "\nNo report of `%s` is here.\n", r.command)
			continue
		}
		fmt.Fprintf(b, "\n`%s`, %s: [%s.md](%s.md), [%s.json](%s.json). %s, %d CPUs, kernel %s, on %s; load %s before, %s after. %s\n", r.command, report.Time.Format("2006-01-02 15:04 MST"),
			r.file, r.file, r.file, r.file, report.Host.CPU, report.Host.CPUs, report.Host.Kernel, report.Host.StateDirectory, report.Host.LoadBefore, report.Host.LoadAfter, sumUp(report))
	}
	for _, t := range pageTables {
		t.write(b, slices.Concat(reports["io-bench"].Rows, reports["io-guest-bench"].Rows))
	}
	b.WriteString("\n| other goals | measured | goal | met | beside | its figure | ratio |\n|---|---|---|---|---|---|---|\n")
	for _, r := range pageReports {
		for _, row := range reports[r.file].Rows {
			if row.Goal != "" && !inTable(row) {
				fmt.Fprintf(b, "| %s | %s | %s | %s | %s | %s | %s |\n", row.Measure, figure(row.P50, row.Unit), row.Goal, met(row), row.Yardstick, figure(row.Beside, row.Unit), within(row))
			}
		}
	}
}

func sumUp(r Report) string {
	goals := 0
	for _, row := range r.Rows {
		if row.Goal != "" {
			goals++
		}
	}
	if goals == 0 {
		return "It has no goals."
	}
	return fmt.Sprintf("%d of %d goals are met.", goals-r.Missed(), goals)
}

// pageTable has a row for each job and a column for each pair of paths.
type pageTable struct {
	title string
	pairs [][2]string // path and yardstick
	names []string
}

var pageTables = []pageTable{
	{"ratio of requests", [][2]string{{"vhost", "raw"}, {"vhost", "qsd-vhost"}, {"nbd", "raw"}, {"nbd", "qemu-nbd"}, {"raw-thread", "raw"}, {"vhost", "raw-thread"}},
		[]string{"vhost / raw", "vhost / qemu-storage-daemon", "NBD / raw", "NBD / qemu-nbd", "raw by another thread / raw", "vhost / raw by another thread"}},
	{"a container's mount", [][2]string{{"mount", "raw"}, {"mount-xfs", "raw"}, {"mount-buffered", "raw"}, {"loop", "raw"}, {"pool", "raw"}},
		[]string{"ext4 / raw", "XFS / raw", "by hand, buffered / raw", "bare loop / raw", "the pool's own cost"}},
	{"copy on write", [][2]string{{"vhost-cow", "vhost"}, {"vhost-cow-base", "vhost"}, {"vhost-cow-first", "vhost-sparse"}, {"nbd-cow", "nbd"}, {"nbd-cow-first", "nbd-sparse"}},
		[]string{"vhost, top layer", "vhost, base", "vhost, first write", "NBD, top layer", "NBD, first write"}},
	{"NBD over TLS", [][2]string{{"nbd-tls", "qemu-nbd-tls"}, {"nbd-tls", "nbdkit-tls"}, {"nbd-tls", "nbd"}},
		[]string{"ours / qemu-nbd", "ours / nbdkit", "over TLS / by a unix socket"}},
	{"in an emulated guest", [][2]string{{"guest-vhost", "guest-virtio"}, {"guest-vhost", "guest-qsd-vhost"}, {"guest-qsd-vhost", "guest-virtio"}, {"guest-nbd", "guest-qemu-nbd"}},
		[]string{"vhost / QEMU's own virtio-blk", "vhost / qemu-storage-daemon", "qemu-storage-daemon / QEMU's own virtio-blk", "kernel's NBD client: ours / qemu-nbd"}},
}

func (t pageTable) write(b *strings.Builder, rows []Row) {
	cells, jobs := map[string]string{}, []string(nil)
	for _, row := range rows {
		if row.Unit != "/s" || !slices.Contains(t.pairs, [2]string{row.Path, row.Against}) {
			continue
		}
		if !slices.Contains(jobs, row.Job) {
			jobs = append(jobs, row.Job)
		}
		cell := within(row)
		if row.Goal != "" {
			cell += "; " + row.Goal + ": " + met(row)
		}
		cells[row.Job+row.Path+" "+row.Against] = cell
	}
	if len(jobs) == 0 {
		return
	}
	fmt.Fprintf(b, "\n| %s | %s |\n|---%s|\n", t.title, strings.Join(t.names, " | "), strings.Repeat("|---", len(t.names)))
	for _, job := range jobs {
		fmt.Fprintf(b, "| %s |", job)
		for _, pair := range t.pairs {
			fmt.Fprintf(b, " %s |", cells[job+pair[0]+" "+pair[1]])
		}
		b.WriteString("\n")
	}
}

// within is a ratio with its interval.
func within(row Row) string {
	if row.High == 0 {
		return ratio(row.Ratio)
	}
	return fmt.Sprintf("%.2f (%.2f to %.2f)", row.Ratio, row.Low, row.High)
}

func inTable(row Row) bool {
	return row.Unit == "/s" && slices.ContainsFunc(pageTables, func(t pageTable) bool {
		return slices.Contains(t.pairs, [2]string{row.Path, row.Against})
	})
}

// pageChart is a chart and the file that it goes to.
type pageChart struct {
	chart
	file string
}

// pageCharts are what is shown of the paths; each has all rows that hold its paths
// against another.
func pageCharts(r Report) (charts []pageChart) {
	for _, c := range []struct {
		file, title string
		ours        []string
	}{
		{"io-vhost.svg", "vhost-user-blk", []string{"vhost", "raw-thread"}},
		{"io-nbd.svg", "NBD", []string{"nbd"}},
		{"io-tls.svg", "NBD over TLS", []string{"nbd-tls"}},
		{"io-mount.svg", "A container's mount, and what it is made of", []string{"mount", "mount-xfs", "mount-buffered", "loop", "pool"}},
		{"io-cow.svg", "Copy-on-write", []string{"vhost-cow", "vhost-cow-base", "vhost-cow-first", "nbd-cow", "nbd-cow-first"}},
	} {
		drawn := chart{title: c.title + ": requests, beside other ways in the same rounds"}
		for _, row := range r.Rows {
			if row.Unit == "/s" && slices.Contains(c.ours, row.Path) {
				drawn.add(row)
			}
		}
		if len(drawn.sections) > 0 {
			charts = append(charts, pageChart{drawn, c.file})
		}
	}
	return charts
}

// add adds a row to the section of its paths.
func (c *chart) add(row Row) {
	path, _ := strings.CutPrefix(row.Measure, row.Job+": ")
	title := path + " beside " + row.Yardstick
	at := slices.IndexFunc(c.sections, func(s chartSection) bool { return s.title == title })
	if at < 0 {
		c.sections, at = append(c.sections, chartSection{title: title}), len(c.sections)
	}
	c.sections[at].bars = append(c.sections[at].bars, chartBar{row.Job, row.Ratio, row.Low, row.High, row.Least, row.Met})
}

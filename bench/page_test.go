package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// someReport has a row of each pair of paths for each of the jobs.
func someReport() Report { return reportOf(IO{ways: ioWays(), pairs: ioPairs()}) }

func reportOf(b IO) Report {
	r := Report{Name: "Paths", Host: Host{CPU: "A <processor> & more", Kernel: "6.18", CPUs: 2}}
	jobs, err := ioJobs()
	if err != nil {
		panic(err) // they are in the program
	}
	samples := func(rate float64) (all []ioSample) {
		for n := range 15 {
			all = append(all, ioSample{iops: rate + float64(n), p50: 1, p99: 2, p999: 3, server: 4, client: 5, machine: 10})
		}
		return all
	}
	for _, j := range jobs {
		taken := map[string][]ioSample{}
		for n, w := range b.ways {
			if w.takes(j) {
				taken[w.key] = samples(1000 + 100*float64(n))
			}
		}
		b.Log = io.Discard
		b.tell(j, taken)
	}
	r.Rows = b.report.Rows
	return r
}

// TestChartsAreWellFormed: each is XML, and has every row of its paths, with its
// figures as text.
func TestChartsAreWellFormed(t *testing.T) {
	r := someReport()
	charts := pageCharts(r)
	if len(charts) != 5 {
		t.Fatalf("%d charts", len(charts))
	}
	bars := 0
	for _, c := range charts {
		var text []string
		rects := 0
		d := xml.NewDecoder(bytes.NewReader(c.svg()))
		for {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v\n%s", c.file, err, c.svg())
			}
			switch token := token.(type) {
			case xml.CharData:
				text = append(text, string(token))
			case xml.StartElement:
				if token.Name.Local == "rect" {
					rects++
				}
			}
		}
		all := strings.Join(text, "\n")
		for _, s := range c.sections {
			if !strings.Contains(all, s.title) {
				t.Errorf("%s does not show %q", c.file, s.title)
			}
			for _, b := range s.bars {
				bars++
				if !strings.Contains(all, b.label) || !strings.Contains(all, fmt.Sprintf("%.2f (%.2f to %.2f)", b.ratio, b.low, b.high)) {
					t.Errorf("%s does not show %q of %q", c.file, b.label, s.title)
				}
			}
		}
		want := 0
		for _, s := range c.sections {
			want += len(s.bars)
		}
		if rects != want {
			t.Errorf("%s has %d bars of %d", c.file, rects, want)
		}
	}
	rows := 0
	for _, row := range r.Rows {
		if row.Unit == "/s" {
			rows++
		}
	}
	if bars != rows {
		t.Errorf("%d of %d rows are in a chart", bars, rows)
	}
}

// TestChartOfExtremes: ratios beyond the picture stay inside it.
func TestChartOfExtremes(t *testing.T) {
	c := chart{title: "a < b", sections: []chartSection{{"s", []chartBar{{"huge", 1000, 1, 2000, 0, false}, {"none", 0, 0, 0, 0, false}}}}}
	var picture struct {
		Rects []struct {
			Width float64 `xml:"width,attr"`
		} `xml:"rect"`
	}
	if err := xml.Unmarshal(c.svg(), &picture); err != nil {
		t.Fatal(err)
	}
	if len(picture.Rects) != 2 || picture.Rects[0].Width != chartRight-chartLeft || picture.Rects[1].Width != 0 {
		t.Errorf("%+v", picture)
	}
}

// TestPage: the part between the marks is replaced, every goal is in it, and doing it
// again changes nothing.
func TestPage(t *testing.T) {
	dir := t.TempDir()
	page := filepath.Join(dir, "performance.md")
	if err := os.WriteFile(page, []byte("# Title\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := WritePage(dir); !errors.Is(err, ErrNoMarks) {
		t.Errorf("without marks: %v", err)
	}
	if err := os.WriteFile(page, []byte("# Title\n\n"+pageBegin+"\nstale\n"+pageEnd+"\n\nMore.\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := someReport()
	var js, inGuest bytes.Buffer
	if err := errors.Join(r.JSON(&js), os.WriteFile(filepath.Join(dir, "io-bench.json"), js.Bytes(), 0o600),
		reportOf(IO{ways: guestWays(), pairs: guestPairs()}).JSON(&inGuest), os.WriteFile(filepath.Join(dir, "io-guest-bench.json"), inGuest.Bytes(), 0o600),
		WritePage(dir)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	got := string(text)
	for _, want := range []string{"# Title\n\n" + pageBegin, pageEnd + "\n\nMore.\n", "No report of `holdfast bench worker` is here.", "![", "io-cow.svg", "io-guest-bench.md", "It has no goals.", "| in an emulated guest | ", "| randread-4k-qd1 | "} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	goals := 0
	for _, row := range r.Rows {
		if row.Goal != "" {
			goals++
			if !strings.Contains(got, row.Goal) {
				t.Errorf("goal %q of %q is not on the page", row.Goal, row.Measure)
			}
		}
	}
	if shown := strings.Count(got, ": yes |") + strings.Count(got, ": **no** |") + strings.Count(got, " | yes |") + strings.Count(got, " | **no** |"); shown != goals || strings.Contains(got, "stale") {
		t.Errorf("%d of %d goals are on the page:\n%s", shown, goals, got)
	}
	if err := WritePage(dir); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(page); err != nil || !bytes.Equal(again, text) {
		t.Errorf("written twice it is another page: %v", err)
	}
}

// TestCompareReports: what intervals tell apart is told, in the right direction, and
// nothing else.
func TestCompareReports(t *testing.T) {
	row := func(name, unit string, ratio, low, high float64) Row {
		return Row{Measure: name, Unit: unit, P50: 10, Yardstick: "raw", Ratio: ratio, Low: low, High: high}
	}
	a := Report{Name: "x", Rows: []Row{
		row("faster", "/s", 0.5, 0.4, 0.6), row("slower", "/s", 0.9, 0.85, 0.95), row("as before", "/s", 0.5, 0.4, 0.6),
		row("cheaper", "µs", 2, 1.9, 2.1), row("dearer", "µs", 1, 0.9, 1.1), row("unknown", "ms", 1, 0, 0), row("gone", "/s", 1, 1, 1),
	}}
	b := Report{Name: "x", Host: Host{CPUs: 4}, Rows: []Row{
		row("faster", "/s", 0.8, 0.7, 0.9), row("slower", "/s", 0.5, 0.4, 0.6), row("as before", "/s", 0.55, 0.45, 0.65),
		row("cheaper", "µs", 1, 0.9, 1.1), row("dearer", "µs", 2, 1.9, 2.1), row("unknown", "ms", 1, 0, 0),
	}}
	want := map[string]string{"faster": verdictBetter, "slower": verdictWorse, "as before": verdictSame, "cheaper": verdictBetter, "dearer": verdictWorse, "unknown": verdictNone}
	got := CompareReports(a, b)
	if len(got.Rows) != len(want) {
		t.Errorf("%d rows", len(got.Rows))
	}
	for _, row := range got.Rows {
		if row.Note != want[row.Measure] {
			t.Errorf("%s is %q, want %q", row.Measure, row.Note, want[row.Measure])
		}
	}
	if notes := strings.Join(got.Notes, "\n"); !strings.Contains(notes, "1 rows are in one") || !strings.Contains(notes, "machines differ") {
		t.Errorf("%s", notes)
	}
}

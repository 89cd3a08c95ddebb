package bench

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev/attach"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/limit"
)

func ms(values ...int) samples {
	var s samples
	for _, v := range values {
		s = append(s, time.Duration(v)*time.Millisecond)
	}
	return s
}

func TestQuantiles(t *testing.T) {
	s := ms(5, 1, 4, 2, 3)
	for q, want := range map[float64]time.Duration{0.01: time.Millisecond, 0.5: 3 * time.Millisecond, 0.8: 4 * time.Millisecond, 0.99: 5 * time.Millisecond, 1: 5 * time.Millisecond} {
		if got := s.quantile(q); got != want {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	if s[0] != 5*time.Millisecond {
		t.Error("the samples were sorted in place: rounds cannot be paired any more")
	}
	if (samples{}).median() != 0 {
		t.Error("no samples have a median")
	}
}

// TestRatiosArePairedByRound: a round in which the machine was slow for both
// counts as any other.
func TestRatiosArePairedByRound(t *testing.T) {
	if got := pairedRatio(ms(2, 200, 2), ms(1, 100, 1)); got != 2 {
		t.Errorf("ratio %v", got)
	}
	if got := pairedRatio(ms(1), nil); got != 0 {
		t.Errorf("ratio to nothing is %v", got)
	}
}

func TestReportSaysWhatIsMissed(t *testing.T) {
	r := Report{Name: "Test", Rows: []Row{
		{Measure: "good", Unit: "ms", P50: 1, Goal: "≤ 2 ms", Met: true},
		{Measure: "bad", Unit: "ms", P50: 3, Goal: "≤ 2 ms", Yardstick: "by hand", Beside: 30, Ratio: 0.1},
		{Measure: "no goal", Unit: "/s", P50: 5},
	}}
	if r.Missed() != 1 {
		t.Errorf("%d goals are missed", r.Missed())
	}
	var md, js bytes.Buffer
	if err := r.Markdown(&md); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(md.String(), "| bad | 3.00 ms |  | ≤ 2 ms | **no** | by hand | 30.00 ms | 0.10 |") {
		t.Errorf("%s", md.String())
	}
	var back Report
	if err := r.JSON(&js); err != nil || json.Unmarshal(js.Bytes(), &back) != nil || len(back.Rows) != 3 {
		t.Errorf("%v: %s", err, js.String())
	}
}

// TestQuickRun takes every measure once, on a real daemon: the bench itself must
// not rot. What it measures is not looked at.
func TestQuickRun(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS, blockdevtest.Runc)
	blockdevtest.LeakCheck(t)
	bin := filepath.Join(t.TempDir(), "holdfastd")
	build := exec.Command("go", "build", "-o", filepath.Dir(bin)+"/", "holdfast/cmd/holdfastd", "holdfast/cmd/holdfast-blockd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, c := range map[string]struct {
		rows int
		run  func(dir string) (Report, error)
	}{
		"lifecycle": {11, func(dir string) (Report, error) {
			l := Lifecycle{Setting: Setting{Daemon: bin, Dir: dir, Rounds: 3, Quick: true, Log: t.Output()}}
			return l.Run(t.Context())
		}},
		"attach": {18, func(dir string) (Report, error) {
			a := Attach{Setting: Setting{Daemon: bin, Dir: dir, Rounds: 3, Quick: true, Log: t.Output()}}
			return a.Run(t.Context())
		}},
		"push": {5, func(dir string) (Report, error) {
			p := Pushes{Setting: Setting{Daemon: bin, Dir: dir, Rounds: 1, Quick: true, Log: t.Output()}}
			return p.Run(t.Context())
		}},
		"overlay": {11, func(dir string) (Report, error) {
			o := Overlay{Setting: Setting{Dir: dir, Quick: true, Log: t.Output()}, Blockd: filepath.Join(filepath.Dir(bin), "holdfast-blockd")}
			return o.Run(t.Context())
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			report, err := c.run(dir)
			if err != nil {
				log, _ := os.ReadFile(filepath.Join(dir, "holdfastd.log")) // says more where there is one
				t.Fatalf("%v\n%s", err, log)
			}
			if len(report.Rows) < c.rows {
				t.Errorf("%d rows", len(report.Rows))
			}
			for _, row := range report.Rows {
				if row.P50 <= 0 && !strings.Contains(row.Measure, "CPU") {
					t.Errorf("nothing was measured for %q", row.Measure)
				}
			}
		})
	}
}

// TestQuickLimits takes a measure of each kind of load once. How well limits hold
// is not looked at here.
func TestQuickLimits(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS, blockdevtest.Runc)
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("no fio:", err)
	}
	limiter, err := limit.New()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := limiter.Explain(attach.Target{Pid: 1}, false); err != nil {
		t.Skip("this host limits no rates:", err)
	}
	blockdevtest.LeakCheck(t)
	bin := filepath.Join(t.TempDir(), "holdfastd")
	build := exec.Command("go", "build", "-o", bin, "holdfast/cmd/holdfastd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	l := Limits{Setting: Setting{Daemon: bin, Dir: t.TempDir(), Quick: true, Log: t.Output()}}
	report, err := l.Run(t.Context())
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(l.Dir, "holdfastd.log"))
		t.Fatalf("%v\n%s", err, log)
	}
	if len(report.Rows) < 9 {
		t.Errorf("%d rows", len(report.Rows))
	}
	for _, row := range report.Rows {
		if row.P50 <= 0 {
			t.Errorf("nothing was measured for %q", row.Measure)
		}
	}
}

package bench

import (
	"cmp"
	"embed"
	"fmt"
	files "path"
	"slices"
	"strconv"
	"strings"
)

// jobFiles are the loads, as fio reads them.
//
//go:embed jobs/*.fio
var jobFiles embed.FS

// ioJob is a load. What its file tells fio our own load generator does as well.
type ioJob struct {
	name   string
	about  string // the comment that its file begins with
	text   string // the file
	reads  int    // of a hundred requests
	random bool
	once   bool // no block twice, until all have been
	block  int  // bytes of a request
	depth  int  // requests in flight
	flush  bool // after each write
}

// ioJobs reads all job files, those of one kind in the order of their depths.
func ioJobs() ([]ioJob, error) {
	entries, err := jobFiles.ReadDir("jobs")
	if err != nil {
		return nil, err
	}
	jobs := make([]ioJob, 0, len(entries))
	for _, e := range entries {
		text, err := jobFiles.ReadFile(files.Join("jobs", e.Name()))
		if err != nil {
			return nil, err
		}
		j, err := parseJob(string(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.Name(), err)
		}
		jobs = append(jobs, j)
	}
	slices.SortFunc(jobs, func(a, b ioJob) int {
		return cmp.Or(strings.Compare(a.kin(), b.kin()), cmp.Compare(a.depth, b.depth))
	})
	return jobs, nil
}

// parseJob reads the little of fio's language that our files use, and refuses the
// rest: what fio does and we do not would be another load.
func parseJob(text string) (ioJob, error) {
	j := ioJob{text: text, depth: 1, once: true}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		key, value, assigned := strings.Cut(line, "=")
		var err error
		switch {
		case line == "":
		case strings.HasPrefix(line, "#"):
			j.about += strings.TrimSpace(line[1:]) + " "
		case strings.HasPrefix(line, "[") && strings.HasSuffix(line, "]") && j.name == "":
			j.name = line[1 : len(line)-1]
		case assigned && j.name != "":
			err = j.set(key, value)
		default:
			err = fmt.Errorf("unknown line %q", line)
		}
		if err != nil {
			return j, err
		}
	}
	j.about = strings.TrimSpace(j.about)
	if j.name == "" || j.block == 0 || j.flush && (j.depth != 1 || j.reads != 0) {
		return j, fmt.Errorf("no name, no block size, or flushes among other requests in flight: %q", text)
	}
	return j, nil
}

func (j *ioJob) set(key, value string) (err error) {
	switch key + "=" + value {
	case "rw=read", "rw=randread":
		j.reads, j.random = 100, value == "randread"
	case "rw=write", "rw=randwrite":
		j.random = value == "randwrite"
	case "rw=randrw":
		j.reads, j.random = 50, true
	case "norandommap=1":
		j.once = false
	case "fsync=1":
		j.flush = true
	case "bs=4k":
		j.block = 4 << 10
	case "bs=64k":
		j.block = 64 << 10
	case "bs=1m":
		j.block = 1 << 20
	default:
		switch key {
		case "iodepth":
			j.depth, err = strconv.Atoi(value)
		case "rwmixread":
			j.reads, err = strconv.Atoi(value)
		default:
			err = fmt.Errorf("unknown setting %s=%s", key, value)
		}
	}
	return err
}

// kin is what jobs that differ in their depth alone have in common.
func (j ioJob) kin() string {
	kin, _, _ := strings.Cut(j.name, "-qd")
	return kin
}

func (j ioJob) writes() bool { return j.reads < 100 }

package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/internal/guest"
	"holdfast/internal/run"
)

// IO measures the paths to a volume's bytes: our servers, the same file without
// anybody in between, and what others offer. All of them take their turn in each
// round, in another order.
type IO struct {
	Setting               // Rounds: 0: 15; Quick: one round of two short jobs
	Each    time.Duration // of each job on each path; 0: 0.5 s, in a guest 0.3 s
	Program string        // the holdfast that serves; "" is this program
	Only    string        // jobs, separated by commas: those whose names contain one of these
	Paths   string        // keys of paths, separated by commas; the yardstick is taken in any case
	Guest   bool          // the paths to the disks of a guest, in which fio runs

	image  string
	base   string // of what is copied on write; "" until it is wanted
	size   int64
	ways   []ioWay // nil: all that we know
	pairs  []ioPair
	notes  []string
	guest  *guest.VM // nil: fio runs here
	paths  []*ioPath
	report Report
}

// Run measures everything and cleans up.
func (b *IO) Run(ctx context.Context) (_ Report, err error) {
	if err := b.defaults(); err != nil {
		return b.report, err
	}
	b.report = Report{Name: "The paths to a volume's bytes", Time: time.Now().UTC(), Host: hostFacts(b.Dir)}
	if b.Guest {
		b.report.Name = "The paths to the bytes of a guest's disk"
	}
	jobs, err := b.jobs()
	if err != nil {
		return b.report, err
	}
	if err := fillImage(b.image, b.size); err != nil {
		return b.report, err
	}
	defer func() { err = errors.Join(err, b.stop()) }()
	if err := b.start(ctx); err != nil {
		return b.report, err
	}
	if err := b.measureAll(ctx, jobs); err != nil {
		return b.report, err
	}
	b.report.Host.LoadAfter = load()
	b.report.Notes = append(b.report.Notes, b.notes...)
	return b.report, nil
}

func (b *IO) defaults() error {
	if b.Rounds == 0 {
		b.Rounds = 15
	}
	b.image, b.size = filepath.Join(b.Dir, "image"), 1<<30
	if b.Quick {
		b.Rounds, b.Each, b.size = 1, 100*time.Millisecond, 16<<20
	}
	if b.Guest {
		b.inGuest()
	}
	if b.Each == 0 {
		b.Each = 500 * time.Millisecond
	}
	if b.ways == nil {
		b.ways, b.pairs, b.notes = ioWays(), ioPairs(), ioNotes
	}
	for key := range strings.SplitSeq(b.Paths, ",") {
		if key != "" && !slices.Contains(b.wayKeys(), key) {
			return fmt.Errorf("no path is called %q; there are %s", key, strings.Join(b.wayKeys(), ", "))
		}
	}
	var err error
	if b.Program == "" {
		b.Program, err = os.Executable()
	}
	return err
}

// jobs are those that are wanted; a name that nothing has is an error.
func (b *IO) jobs() ([]ioJob, error) {
	all, err := ioJobs()
	if err != nil {
		return nil, err
	}
	wanted := slices.DeleteFunc(all, func(j ioJob) bool {
		if b.Quick && b.Only == "" {
			return j.name != "randread-4k-qd32" && j.name != "first-write-4k-qd1"
		}
		return !slices.ContainsFunc(strings.Split(b.Only, ","), func(part string) bool { return strings.Contains(j.name, part) })
	})
	if len(wanted) == 0 {
		return nil, fmt.Errorf("no job's name contains any of %q", b.Only)
	}
	return wanted, nil
}

// fillImage writes a file with data everywhere, and flushes it.
func fillImage(path string, size int64) error {
	chunk := make([]byte, 4<<20)
	random := rand.New(rand.NewPCG(2, uint64(size)))
	for i := range chunk {
		chunk[i] = byte(random.Uint32())
	}
	if err := writeFile(path, chunk, size, random); err != nil {
		return err
	}
	return syncPath(path)
}

// start opens the wanted paths. One whose program is not on this machine is named in
// the report and left out.
func (b *IO) start(ctx context.Context) error {
	if b.Guest {
		if err := b.openGuest(ctx); err != nil {
			return err
		}
	}
	for _, w := range b.ways {
		if w.key != "raw" && !chosen(b.Paths, w.key) {
			continue
		}
		p := &ioPath{ioWay: w}
		err := w.open(ctx, b, p)
		if errors.Is(err, run.ErrNotFound) {
			b.report.Notes = append(b.report.Notes, fmt.Sprintf("%s was left out: %v.", w.name, err))
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		b.paths = append(b.paths, p)
	}
	return nil
}

// stop ends the servers.
func (b *IO) stop() error {
	var errs []error
	if b.guest != nil { // before the servers of its disks
		errs = append(errs, b.guest.Close())
		b.guest = nil
	}
	for _, p := range b.paths {
		if p.close != nil {
			errs = append(errs, p.close())
		}
	}
	b.paths = nil
	return errors.Join(errs...)
}

func (b *IO) measureAll(ctx context.Context, jobs []ioJob) error {
	if b.Guest {
		return b.measureGuest(ctx, jobs)
	}
	for _, job := range jobs {
		if err := b.measure(ctx, job); err != nil {
			return err
		}
	}
	return nil
}

// measure takes all rounds of one job.
func (b *IO) measure(ctx context.Context, j ioJob) error {
	paths := slices.DeleteFunc(slices.Clone(b.paths), func(p *ioPath) bool { return !p.takes(j) })
	taken := map[string][]ioSample{}
	for round := range b.Rounds {
		for turn := range paths {
			p := paths[(round+turn)%len(paths)]
			s, err := p.measureOnce(ctx, j, b.Each)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", j.name, p.name, err)
			}
			taken[p.key] = append(taken[p.key], s)
		}
	}
	b.tell(j, taken)
	return nil
}

// named finds a way's name by its key.
func (b *IO) named(key string) string {
	for _, w := range b.ways {
		if w.key == key {
			return w.name
		}
	}
	return key
}

func (b *IO) wayKeys() (keys []string) {
	for _, w := range b.ways {
		keys = append(keys, w.key)
	}
	return keys
}

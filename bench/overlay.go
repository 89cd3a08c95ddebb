package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"time"
	"unsafe"

	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// Overlay measures copy-on-write in layers beside a plain file on the same
// filesystem (XFS in an image), one request at a time past the page cache, and
// beside the filesystem's own clones. The mechanism is measured in this process, then
// what a guest gets of a worker.
type Overlay struct {
	Setting        // Rounds: 0: 15
	Blockd  string // the worker's program; "": the one beside this program

	at     string   // the filesystem
	plain  *os.File // O_DIRECT, written
	base   *os.File
	layers []*os.File // of all layers that were made
	report Report
	order  *rand.Rand
}

const (
	overlayBlock = overlay.BlockSize
	farChunk     = 64 << 10
)

func (o *Overlay) size() int64 {
	if o.Quick {
		return 64 << 20
	}
	return 1 << 30
}

// batch is how many requests are one sample.
func (o *Overlay) batch() int {
	if o.Quick {
		return 50
	}
	return 1000
}

// Run measures everything and cleans up.
func (o *Overlay) Run(ctx context.Context) (_ Report, err error) {
	if o.Rounds == 0 {
		o.Rounds = 15
	}
	if o.Quick {
		o.Rounds = 1
	}
	o.order = rand.New(rand.NewPCG(1, 2)) //nolint:gosec // where requests go
	o.report = Report{Name: "Copy-on-write in layers", Time: time.Now().UTC(), Host: hostFacts(o.Dir)}
	if err := o.mount(ctx); err != nil {
		return o.report, err
	}
	defer func() { err = errors.Join(err, o.unmount(context.WithoutCancel(ctx))) }()
	for _, part := range []func(context.Context) error{o.requests, o.seals, o.stalls, o.servedStalls, o.farAway} {
		if err := part(ctx); err != nil {
			return o.report, err
		}
	}
	o.report.Host.LoadAfter = load()
	return o.report, nil
}

func (o *Overlay) mount(ctx context.Context) error {
	o.at = filepath.Join(o.Dir, "xfs")
	image := filepath.Join(o.Dir, "xfs.image")
	if err := os.Mkdir(o.at, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"truncate", "--size", fmt.Sprint(8*o.size() + 1<<30), image}, {"mkfs.xfs", "-q", "-m", "reflink=1", image}, {"mount", "-o", "loop", image, o.at},
	} {
		if _, err := run.Run(ctx, run.Cmd{Args: args}); err != nil {
			return err
		}
	}
	var err error
	if o.base, err = o.filled("base", 0); err != nil {
		return err
	}
	o.plain, err = o.filled("plain", syscall.O_DIRECT)
	return err
}

func (o *Overlay) unmount(ctx context.Context) error {
	for _, f := range append(o.layers, o.base, o.plain) {
		_ = f.Close() // scratch, and some are closed already
	}
	_, err := run.Run(ctx, run.Cmd{Args: []string{"umount", o.at}})
	return err
}

func (o *Overlay) file(name string, flag int) (*os.File, error) {
	return os.OpenFile(filepath.Join(o.at, name), os.O_RDWR|os.O_CREATE|flag, 0o600)
}

// filled makes a file of bytes that are nowhere zero.
func (o *Overlay) filled(name string, flag int) (*os.File, error) {
	f, err := o.file(name, flag)
	if err != nil {
		return nil, err
	}
	p := direct(1 << 20)
	for off := int64(0); off < o.size(); off += int64(len(p)) {
		for i := range p {
			p[i] = byte(o.order.Uint32()) | 1
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return nil, err
		}
	}
	return f, f.Sync()
}

// direct makes a buffer for direct I/O.
func direct(n int) []byte {
	b := make([]byte, n+overlayBlock)
	return b[overlayBlock-int(uintptr(unsafe.Pointer(&b[0]))%overlayBlock):][:n]
}

// layer makes an empty layer in files of this name, durably.
func (o *Overlay) layer(name string) (overlay.Files, func(), error) {
	f, gone, err := o.layerFiles(name)
	if err == nil {
		err = overlay.Create(f, o.size())
	}
	return f, gone, err
}

// layerFiles makes the two files of a layer.
func (o *Overlay) layerFiles(name string) (overlay.Files, func(), error) {
	data, err := o.file(name+".data", syscall.O_DIRECT)
	if err != nil {
		return overlay.Files{}, nil, err
	}
	m, err := o.file(name+".map", 0)
	if err != nil {
		return overlay.Files{}, nil, errors.Join(err, data.Close())
	}
	o.layers = append(o.layers, data, m)
	gone := func() {
		for _, f := range []*os.File{data, m} {
			_ = errors.Join(f.Close(), os.Remove(f.Name())) // scratch
		}
	}
	return overlay.Files{Data: overlay.OSFile{File: data}, Map: overlay.OSFile{File: m}}, gone, nil
}

// target is a volume or a plain file.
type target interface {
	io.ReaderAt
	io.WriterAt
}

// flusher is a target that is flushed now and then.
type flusher func() error

// requests measures single requests: hits, rewrites and first writes.
func (o *Overlay) requests(ctx context.Context) error {
	o.say("requests, %d rounds of %d", o.Rounds, o.batch())
	over := overlay.NewImage(o.base, o.size())
	var hit, hitBeside, again, againBeside, first, firstBeside, firstFlush, firstFlushBeside samples
	for round := range o.Rounds {
		if err := ctx.Err(); err != nil {
			return err
		}
		f, gone, err := o.layer(fmt.Sprintf("volume-%d", round))
		if err != nil {
			return err
		}
		v, err := overlay.Open([]overlay.Files{f}, over)
		if err != nil {
			return err
		}
		sparse, err := o.file("sparse", syscall.O_DIRECT)
		if err != nil {
			return err
		}
		err = errors.Join(sparse.Truncate(0), sparse.Truncate(o.size()))
		half := o.places(2 * o.batch())
		written, flushed := half[:o.batch()], half[o.batch():]
		none := func() error { return nil }
		err = errors.Join(err,
			o.write(sparse, written, none, &firstBeside), o.write(v, written, none, &first),
			o.write(sparse, flushed, sparse.Sync, &firstFlushBeside), o.write(v, flushed, v.Sync, &firstFlush),
			o.read(sparse, written, &hitBeside), o.read(v, written, &hit),
			o.write(sparse, written, none, &againBeside), o.write(v, written, none, &again),
			sparse.Close())
		gone()
		if err != nil {
			return err
		}
	}
	for _, m := range []struct {
		name         string
		ours, beside samples
		most         float64
	}{
		{"random 4 KiB reads of blocks that the top layer holds", hit, hitBeside, 1 / 0.95},
		{"random 4 KiB rewrites of such blocks", again, againBeside, 1 / 0.95},
		{"first random 4 KiB writes", first, firstBeside, 1 / 0.85},
		{"first random 4 KiB writes, a flush after each 16", firstFlush, firstFlushBeside, 0},
	} {
		row := Row{Measure: m.name, Unit: "µs", Samples: len(m.ours), P50: o.each(m.ours.median()), P99: o.each(m.ours.quantile(0.99)),
			Yardstick: "the same in a plain sparse file", Beside: o.each(m.beside.median()), Ratio: pairedRatio(m.ours, m.beside)}
		if m.most > 0 {
			row.Goal, row.Met = fmt.Sprintf("≤ %.2f× the yardstick", m.most), row.Ratio <= m.most
		}
		o.report.Rows = append(o.report.Rows, row)
	}
	return nil
}

// each is the time of one request of a batch, in microseconds.
func (o *Overlay) each(d time.Duration) float64 {
	return float64(d) / float64(time.Microsecond) / float64(o.batch())
}

// places are n different blocks, in no order.
func (o *Overlay) places(n int) []int64 {
	seen, places := map[int64]bool{}, make([]int64, 0, n)
	for len(places) < n {
		at := o.order.Int64N(o.size()/overlayBlock) * overlayBlock
		if !seen[at] {
			seen[at] = true
			places = append(places, at)
		}
	}
	return places
}

func (o *Overlay) write(to target, places []int64, flush flusher, s *samples) error {
	p := direct(overlayBlock)
	_, _ = rand.NewChaCha8([32]byte{}).Read(p)
	return s.time(func() error {
		for i, at := range places {
			if _, err := to.WriteAt(p, at); err != nil {
				return err
			}
			if i%16 == 15 {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func (o *Overlay) read(from target, places []int64, s *samples) error {
	p := direct(overlayBlock)
	return s.time(func() error {
		for _, at := range places {
			if _, err := from.ReadAt(p, at); err != nil {
				return err
			}
		}
		return nil
	})
}

// seals measures snapshots of a volume in many pieces beside clones of the same file.
func (o *Overlay) seals(ctx context.Context) error {
	pieces := 75_000
	if o.Quick {
		pieces = 500
	}
	o.say("seals of a volume in %d pieces", pieces)
	f, gone, err := o.layer("pieces")
	if err != nil {
		return err
	}
	defer gone()
	v, err := overlay.Open([]overlay.Files{f}, nil)
	if err != nil {
		return err
	}
	p := direct(overlayBlock)
	for n := range int64(pieces) { // every second block, backwards: no two of them are one extent
		if _, err := v.WriteAt(p, (int64(pieces)-1-n)*2*overlayBlock%o.size()); err != nil {
			return err
		}
	}
	if err := v.Close(); err != nil {
		return err
	}
	data := f.Data.(overlay.OSFile).File //nolint:forcetypeassert // layer has made it so
	var ours, beside samples
	for n := range min(o.Rounds, 5) {
		remove, err := o.cloneFile(data, n, &beside)
		if err != nil {
			return err
		}
		defer remove() // a removal of so many pieces would go on for long beside what is measured
		if err := errors.Join(ctx.Err(), o.sealPieces(f, n, &ours)); err != nil {
			return err
		}
	}
	o.report.Rows = append(o.report.Rows, Row{
		Measure: fmt.Sprintf("snapshot of a volume of %d pieces, durable", pieces), Unit: "ms", Samples: len(ours), P50: milliseconds(ours.median()), P99: milliseconds(ours.quantile(0.99)),
		Goal: "p50 ≤ 5 ms", Met: ours.median() <= 5*time.Millisecond, Yardstick: "FICLONE of the same file, fsync", Beside: milliseconds(beside.median()), Ratio: pairedRatio(ours, beside),
	})
	return nil
}

func (o *Overlay) cloneFile(from *os.File, n int, s *samples) (remove func(), err error) {
	to, err := o.file(fmt.Sprintf("clone-%d", n), 0)
	if err != nil {
		return nil, err
	}
	remove = func() { _ = errors.Join(to.Close(), os.Remove(to.Name())) } // scratch
	return remove, s.time(func() error { return errors.Join(sys.CloneFile(to, from), to.Sync()) })
}

// sealPieces seals the volume that this layer alone is, with some writes that nobody has
// flushed.
func (o *Overlay) sealPieces(f overlay.Files, n int, s *samples) error {
	v, err := overlay.Open([]overlay.Files{f}, nil)
	if err != nil {
		return err
	}
	const writes = 16
	p := direct(overlayBlock)
	for i := range int64(writes) {
		if _, err := v.WriteAt(p, o.size()-(int64(n)*writes+i+1)*2*overlayBlock); err != nil {
			return err
		}
	}
	return errors.Join(o.sealOnce(v, n, s), v.Close())
}

// sealOnce makes the new layer's files as well, and a record of the stack, as a pool
// does.
func (o *Overlay) sealOnce(v *overlay.Overlay, n int, s *samples) error {
	return s.time(func() error {
		next, _, err := o.layerFiles(fmt.Sprintf("sealed-%d", n)) // its files stay: layers above need what is below
		if err == nil {
			err = overlay.Make(next, o.size())
		}
		if err != nil {
			return err
		}
		return v.Seal(next, func() error { return o.record(n, next.Sync, func() error { return sys.SyncDir(o.at) }) })
	})
}

// record is what a volume's owner does: a small file, durably replaced; what it needs
// is made durable beside it.
func (o *Overlay) record(n int, needs ...func() error) error {
	f, err := o.file("record.new", os.O_TRUNC)
	if err != nil {
		return err
	}
	synced := make(chan error, len(needs))
	for _, one := range needs {
		go func() { synced <- one() }()
	}
	_, err = fmt.Fprintf(f, "%d\n", n)
	err = errors.Join(err, f.Sync(), f.Close())
	for range needs {
		err = errors.Join(err, <-synced)
	}
	return errors.Join(err, os.Rename(f.Name(), filepath.Join(o.at, "record")), sys.SyncDir(o.at))
}

// stalls measures what a writer feels of a snapshot each 50 ms.
func (o *Overlay) stalls(ctx context.Context) error {
	o.say("a writer under snapshots")
	f, gone, err := o.layer("stalled")
	if err != nil {
		return err
	}
	defer gone()
	v, err := overlay.Open([]overlay.Files{f}, overlay.NewImage(o.base, o.size()))
	if err != nil {
		return err
	}
	still, err := o.writeFor(ctx, v)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sealed := make(chan error, 1)
	go func() {
		var unused samples
		for n := 1000; ; n++ {
			select {
			case <-ctx.Done():
				sealed <- nil
				return
			case <-time.After(50 * time.Millisecond):
			}
			if err := o.sealOnce(v, n, &unused); err != nil {
				sealed <- err
				return
			}
			if err := v.Absorb(ctx, 0, func() error { return o.record(n) }); err != nil && ctx.Err() == nil {
				sealed <- err
				return
			}
		}
	}()
	under, err := o.writeFor(ctx, v)
	cancel()
	if err := errors.Join(err, <-sealed); err != nil {
		return err
	}
	worst := under.quantile(0.999)
	o.report.Rows = append(o.report.Rows, Row{
		Measure: "4 KiB write while a snapshot is made and merged each 50 ms, p99.9", Unit: "ms", Samples: len(under), P50: milliseconds(worst),
		Goal: "≤ 10 ms", Met: worst <= 10*time.Millisecond, Yardstick: "the same without snapshots, p99.9", Beside: milliseconds(still.quantile(0.999)), Ratio: float64(worst) / float64(still.quantile(0.999)),
	})
	return nil
}

// writeFor writes one block after the other for a while and times each.
func (o *Overlay) writeFor(ctx context.Context, v *overlay.Overlay) (samples, error) {
	p, each := direct(overlayBlock), 3*time.Second
	if o.Quick {
		each = 200 * time.Millisecond
	}
	var s samples
	for end := time.Now().Add(each); time.Now().Before(end); {
		at := rand.Int64N(o.size()/overlayBlock) * overlayBlock
		if err := errors.Join(ctx.Err(), s.time(func() error { _, err := v.WriteAt(p, at); return err })); err != nil {
			return nil, err
		}
	}
	return s, nil
}

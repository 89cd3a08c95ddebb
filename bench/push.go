package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"holdfast/api/client"
	"holdfast/internal/localdaemon"
	parts "holdfast/internal/push"
	"holdfast/internal/tarball"
)

// Pushes measures what a push of a directory takes on the wire and in time: the
// first one, one of an unchanged tree, and one in which 1 % changed.
type Pushes struct {
	Setting // Rounds: 0: 5; Quick: a small tree: a smoke test of the bench itself
}

// Run measures everything and cleans up; see Lifecycle.Run.
func (p *Pushes) Run(ctx context.Context) (report Report, err error) {
	if p.Rounds == 0 {
		p.Rounds = 5
	}
	report = Report{Name: "Pushes", Time: time.Now().UTC(), Host: hostFacts(p.Dir)}
	defer func() { report.Host.LoadAfter = load() }()
	d, err := localdaemon.Start(ctx, p.Daemon, filepath.Join(p.Dir, "state"), "--pool-size", "8GiB")
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, d.Remove(context.WithoutCancel(ctx))) }()
	w, err := newWire(d)
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	mib, files := int64(300), 15_000
	if p.Quick {
		mib, files = 10, 300
	}
	dir := filepath.Join(p.Dir, "tree")
	if err := makeTree(dir, mib, files); err != nil {
		return report, err
	}
	m := pushed{w: w, dir: dir}
	for round := range p.Rounds {
		p.say("round %d", round+1)
		if err := m.round(ctx, d, round); err != nil {
			return report, err
		}
	}
	report.Rows = m.rows(fmt.Sprintf("%d MiB in %d files", mib, files))
	return report, nil
}

// pushed is what the rounds measured.
type pushed struct {
	w   *wire
	dir string

	first, unchanged, changed                samples
	firstBytes, unchangedBytes, changedBytes []int64
}

// round pushes a tree to a new template, again, and again with 1 % changed.
func (m *pushed) round(ctx context.Context, d *localdaemon.Daemon, n int) error {
	name := fmt.Sprintf("round-%d", n)
	for _, step := range []struct {
		took  *samples
		bytes *[]int64
	}{{&m.first, &m.firstBytes}, {&m.unchanged, &m.unchangedBytes}, {&m.changed, &m.changedBytes}} {
		if step.took == &m.changed {
			if err := m.change(n); err != nil {
				return err
			}
		}
		before := m.w.sent.Load()
		if err := step.took.time(func() error { return m.push(ctx, name) }); err != nil {
			return err
		}
		*step.bytes = append(*step.bytes, m.w.sent.Load()-before)
	}
	_, err := d.Client.DeleteTemplate(ctx, name)
	return err
}

func (m *pushed) push(ctx context.Context, name string) error {
	plan, err := tarball.New(ctx, m.dir)
	if err != nil {
		return err
	}
	archive := plan.Reader()
	_, err = m.w.client.PushTemplate(ctx, client.Push{Name: name, Archive: archive, Length: plan.Length(), Delta: parts.Directory(plan)})
	return errors.Join(err, archive.Close())
}

// change rewrites every hundredth file, to other bytes in each round.
func (m *pushed) change(n int) error {
	i := 0
	return filepath.WalkDir(m.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if i++; i%100 != 0 {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for k := range b {
			b[k] ^= byte(k + n + 1)
		}
		return os.WriteFile(path, b, 0o600)
	})
}

// rows are the figures; shares of bytes are in per cent.
func (m *pushed) rows(tree string) []Row {
	share := func(what string, ours []int64, most float64) Row {
		var worst float64
		for i := range ours {
			worst = max(worst, 100*float64(ours[i])/float64(m.firstBytes[i]))
		}
		return Row{
			Measure: what + ": bytes", Unit: "% of the first push's", Samples: len(ours), P50: worst, Goal: fmt.Sprintf("≤ %g %%", most), Met: worst <= most,
			Note: "the worst round; everything that the client sends, counted before the server",
		}
	}
	took := func(what string, ours samples) Row {
		r := Row{Measure: what + ": time to READY", Unit: "ms", Samples: len(ours), P50: milliseconds(ours.median())}
		if what != "first push" {
			r.Yardstick, r.Beside, r.Ratio = "the first push", milliseconds(m.first.median()), pairedRatio(ours, m.first)
		}
		return r
	}
	rows := []Row{
		took("first push", m.first), took("unchanged push", m.unchanged), share("unchanged push", m.unchangedBytes, 1),
		took("push with 1 % changed", m.changed), share("push with 1 % changed", m.changedBytes, 10),
	}
	rows[0].Note = tree
	return rows
}

// wire is a client of a daemon whose bytes are counted on their way.
type wire struct {
	client *client.Client
	listen net.Listener
	to     string
	sent   atomic.Int64
}

func newWire(d *localdaemon.Daemon) (*wire, error) {
	u, err := url.Parse(d.URL)
	if err != nil {
		return nil, err
	}
	w := &wire{to: u.Host}
	if w.listen, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	u.Host = w.listen.Addr().String()
	go w.accept()
	w.client, err = client.New(client.Options{URL: u.String(), Key: d.Key, Workspace: "main"})
	return w, err
}

func (w *wire) close() error {
	w.client.Close()
	return w.listen.Close()
}

func (w *wire) accept() {
	for {
		from, err := w.listen.Accept()
		if err != nil {
			return // closed
		}
		go w.forward(from)
	}
}

// forward passes a connection on until either side ends it.
func (w *wire) forward(from net.Conn) {
	defer from.Close()
	to, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer to.Close()
	go func() {
		_, _ = io.Copy(from, to)
		_ = from.Close()
	}()
	_, _ = io.Copy(counted{to, &w.sent}, from)
}

type counted struct {
	io.Writer
	n *atomic.Int64
}

func (c counted) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.n.Add(int64(n))
	return n, err
}

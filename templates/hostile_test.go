package templates_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	"holdfast/templates"
	"holdfast/templates/archivetest"
)

// fewestHostile is how many cases there must be at least.
const fewestHostile = 200

// mostHeap is what all of them together may make of the heap, in bytes, with
// what they are made of and what the collector has not got to yet.
const mostHeap = 256 << 20

// Every hostile archive goes the way of an upload: it is refused by name, its
// version has the reason, and nothing is left of it anywhere.
func TestHostileArchives(t *testing.T) {
	l := archivetest.SmallBounds
	r := plainRig(t, func(o *templates.Options) {
		o.MaxArchiveBytes, o.MaxEntries, o.FreeBytes, o.MaxRatio = l.Bytes, l.Entries, l.Free, l.Ratio
	})
	r.put("hostile")
	cases := archivetest.Hostile(l)
	if len(cases) < fewestHostile {
		t.Fatalf("only %d", len(cases))
	}
	peak := watchHeap(t)
	before := r.files()
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			at := *r
			at.t = t
			at.refuses(c)
		})
	}
	r.expectPool(0)
	if after := r.files(); after != before {
		t.Errorf("files before:\n%s\nand after:\n%s", before, after)
	}
	if peak := peak(); peak > mostHeap {
		t.Errorf("the heap had %d MiB", peak>>20)
	} else {
		t.Logf("%d cases, at most %d MiB of heap", len(cases), peak>>20)
	}
}

func (r *rig) refuses(c archivetest.Case) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	u := r.begin("hostile", "")
	to := u.upload()
	to.Format = c.Format
	body, length := c.Open()
	v, err := r.Ingest(ctx, to, length, body)
	if errors.Is(err, templates.ErrInvalid) && length > archivetest.SmallBounds.Bytes {
		return // refused by its size, before anything was read
	}
	if !errors.Is(err, templates.ErrArchive) {
		r.t.Fatalf("want a refusal, have %v and %+v", err, v)
	}
	text := err.Error()
	if !strings.Contains(text, c.Says) {
		r.t.Errorf("%q does not say %q", text, c.Says)
	}
	if c.Entry != "" && !strings.Contains(text, c.Entry) {
		r.t.Errorf("%q does not name %q", text, c.Entry)
	}
	if len(text) > 1000 {
		r.t.Errorf("a message of %d bytes", len(text))
	}
	if strings.Contains(text, r.dir) {
		r.t.Errorf("a path of the host is in %q", text)
	}
	have, terr := r.Template(workspace, "hostile")
	if terr != nil {
		r.t.Fatal(terr)
	}
	if last := have.Revisions[len(have.Revisions)-1]; last.Status != templates.Failed || last.Failure == "" || string(last.ID) != u.id {
		r.t.Errorf("its version is %+v", last)
	}
	r.expectStagingEmpty()
}

// files lists what there is where the library could have put something.
func (r *rig) files() string {
	r.t.Helper()
	var list []string
	err := filepath.WalkDir(r.dir, func(path string, _ fs.DirEntry, err error) error {
		list = append(list, path)
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, dir := range []string{".", os.TempDir()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			r.t.Fatal(err)
		}
		for _, e := range entries {
			if dir == "." || strings.HasPrefix(e.Name(), "upload-") || strings.HasPrefix(e.Name(), "image-") {
				list = append(list, filepath.Join(dir, e.Name()))
			}
		}
	}
	return strings.Join(list, "\n")
}

// watchHeap looks at the heap all the time; what it gives tells the most that
// there was, and ends the looking.
func watchHeap(t testing.TB) (peak func() uint64) {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	stop, done := make(chan struct{}), make(chan uint64)
	go func() {
		var most uint64
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			metrics.Read(sample)
			most = max(most, sample[0].Value.Uint64())
			select {
			case <-tick.C:
			case <-stop:
				done <- most
				return
			}
		}
	}()
	return func() uint64 {
		close(stop)
		return <-done
	}
}

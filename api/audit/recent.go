package audit

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"

	"holdfast/api"
)

const (
	keepRecent     = 1000    // entries of one workspace, and of all together
	keepWorkspaces = 1000    // whose entries are kept apart
	tailBytes      = 8 << 20 // read of each file at the start
	maxLine        = 64 << 10
)

// recent holds the newest entries.
type recent struct {
	all  ring
	each map[string]*ring
}

func (r *recent) add(e api.Entry) {
	r.all.add(e)
	if r.each == nil {
		r.each = map[string]*ring{}
	}
	one := r.each[e.Workspace]
	if one == nil {
		if len(r.each) >= keepWorkspaces {
			r.forgetQuietest()
		}
		one = &ring{}
		r.each[e.Workspace] = one
	}
	one.add(e)
}

// forgetQuietest drops the workspace whose newest entry is oldest.
func (r *recent) forgetQuietest() {
	quietest, found := "", false
	for name, one := range r.each {
		if !found || one.newest().Time.Before(r.each[quietest].newest().Time) {
			quietest, found = name, true
		}
	}
	delete(r.each, quietest)
}

func (r *recent) list(workspace string, limit int) []api.Entry {
	if workspace == "" {
		return r.all.list(limit)
	}
	if one := r.each[workspace]; one != nil {
		return one.list(limit)
	}
	return nil
}

// ring is the newest keepRecent entries; it grows as it is needed.
type ring struct {
	entries []api.Entry
	next    int // where the oldest is, once it is full
}

func (r *ring) add(e api.Entry) {
	if len(r.entries) < keepRecent {
		r.entries = append(r.entries, e)
		return
	}
	r.entries[r.next] = e
	r.next = (r.next + 1) % keepRecent
}

// at gives the i-th newest.
func (r *ring) at(i int) api.Entry {
	n := len(r.entries)
	return r.entries[(r.next+n-1-i)%n]
}

func (r *ring) newest() api.Entry { return r.at(0) }

func (r *ring) list(limit int) []api.Entry {
	list := make([]api.Entry, 0, max(0, min(limit, len(r.entries))))
	for i := range cap(list) {
		list = append(list, r.at(i))
	}
	return list
}

// remember reads the end of a file. Lines that are none of ours (a torn one, or
// one that somebody wrote into the file) are passed over.
func (l *Log) remember(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() > tailBytes {
		if _, err := f.Seek(-tailBytes, io.SeekEnd); err != nil {
			return err
		}
	}
	return l.rememberLines(bufio.NewReaderSize(f, maxLine))
}

func (l *Log) rememberLines(r *bufio.Reader) error {
	for {
		text, err := r.ReadSlice('\n')
		if e, ok := parse(text); ok {
			l.recent.add(e)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull): // no line of ours: its rest is passed over too
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

func parse(text []byte) (api.Entry, bool) {
	var e line
	if err := json.Unmarshal(text, &e); err != nil || e.Action == "" || e.Time.IsZero() {
		return api.Entry{}, false
	}
	return clipped(api.Entry(e)), true
}

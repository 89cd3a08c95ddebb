package templates

import (
	"cmp"
	"context"
	"errors"
	"os"
	"slices"

	"holdfast/blockdev"
	"holdfast/blockdev/tree"
)

// share is a range of contents that came and that another file has as well.
type share struct {
	fresh  int64 // where in what came
	length int64
	store  int // which file has it
	from   int64
}

// sharesWith finds what of a tree, whose contents came, a base has too: equal
// chunks, first of the file of the same name, so that neighbours stay neighbours,
// else of any. store is the base's number.
func sharesWith(fresh, base tree.Tree, store int) []share {
	f := finder{base: base}
	var shares []share
	for i := range fresh.Nodes {
		n := &fresh.Nodes[i]
		if n.Kind != tree.Regular {
			continue
		}
		same := base.Find(n.Path)
		var ours, theirs cursor
		for k, d := range n.Digests {
			if d == (tree.Digest{}) {
				continue
			}
			b, chunk := same, k
			if b == nil || k >= len(b.Digests) || b.Digests[k] != d {
				if b, chunk = f.find(d); b == nil {
					continue
				}
			}
			shares = appendShares(shares, ours.chunk(n, k), theirs.chunk(b, chunk), store)
		}
	}
	slices.SortFunc(shares, func(a, b share) int { return cmp.Compare(a.fresh, b.fresh) })
	return joined(shares)
}

// finder finds chunks by their digest.
type finder struct {
	base  tree.Tree
	index map[tree.Digest][2]int32 // node and chunk; made when it is needed
}

func (f *finder) find(d tree.Digest) (*tree.Node, int) {
	if f.index == nil {
		f.index = map[tree.Digest][2]int32{}
		for i := range f.base.Nodes {
			for k, d := range f.base.Nodes[i].Digests {
				if d != (tree.Digest{}) {
					f.index[d] = [2]int32{int32(i), int32(k)} //nolint:gosec // they fit in memory
				}
			}
		}
	}
	at, ok := f.index[d]
	if !ok {
		return nil, 0
	}
	return &f.base.Nodes[at[0]], int(at[1])
}

// cursor gives the runs of chunks of a file, fast when they are asked for in order.
type cursor struct {
	of *tree.Node
	i  int
}

// chunk gives the parts of runs in chunk k, with offsets in the chunk.
func (c *cursor) chunk(n *tree.Node, k int) (runs []tree.Run) {
	begin, end := int64(k)*tree.Chunk, int64(k+1)*tree.Chunk
	if c.of != n || c.i < len(n.Runs) && n.Runs[c.i].Offset > begin {
		*c = cursor{of: n}
	}
	for c.i < len(n.Runs) && n.Runs[c.i].Offset+n.Runs[c.i].Length <= begin {
		c.i++
	}
	for _, r := range n.Runs[c.i:] {
		if r.Offset >= end {
			break
		}
		from, to := max(r.Offset, begin), min(r.Offset+roundUp(r.Length, tree.Block), end)
		runs = append(runs, tree.Run{Offset: from - begin, Length: to - from, Store: r.Store, At: r.At + from - r.Offset})
	}
	return runs
}

// appendShares pairs the runs of two equal chunks.
func appendShares(to []share, ours, theirs []tree.Run, store int) []share {
	for len(ours) > 0 && len(theirs) > 0 {
		a, b := &ours[0], &theirs[0]
		if a.Offset != b.Offset || a.Store != 0 {
			return to // one of them is not as canonical as it should be
		}
		n := min(a.Length, b.Length)
		to = append(to, share{fresh: a.At, length: n, store: store, from: b.At})
		for _, r := range []*tree.Run{a, b} {
			r.Offset, r.At, r.Length = r.Offset+n, r.At+n, r.Length-n
		}
		if a.Length == 0 {
			ours = ours[1:]
		}
		if b.Length == 0 {
			theirs = theirs[1:]
		}
	}
	return to
}

func joined(shares []share) []share {
	var out []share
	for _, s := range shares {
		if n := len(out); n > 0 {
			last := &out[n-1]
			if last.fresh+last.length == s.fresh && last.from+last.length == s.from && last.store == s.store {
				last.length += s.length
				continue
			}
		}
		out = append(out, s)
	}
	return out
}

// base is an earlier revision whose blocks a new one shares.
type base struct {
	image   *os.File
	tree    tree.Tree
	family  blockdev.ID
	release func()
}

// baseFor gives the newest READY revision of a template, if the pool can share
// blocks at all; nil when there is none that is of use.
func (l *Library) baseFor(ctx context.Context, key string) *base {
	r := l.lookup(key)
	if r == nil || !l.reflinks {
		return nil
	}
	latest := r.Template.Latest()
	if latest == nil || latest.Remote != nil {
		return nil
	}
	v, err := l.pin(latest.ID)
	if err != nil {
		return nil
	}
	b := &base{family: v.family()}
	b.image, b.release, err = l.lend(ctx, v.ID)
	if err == nil {
		if b.tree, err = l.manifest(ctx, v); err != nil {
			b.release()
		}
	}
	if err != nil {
		l.unpin(v.ID)
		if !errors.Is(err, context.Canceled) {
			l.o.Log.Warn("nothing is shared with the version before", "version", v.Name, "image", v.ID, "cause", err)
		}
		return nil
	}
	closeImage := b.release
	b.release = func() { closeImage(); l.unpin(v.ID) }
	return b
}

// twin finds, and pins, a READY revision of a workspace with the same tree. Those
// of other workspaces are not looked at: how long an upload takes is no answer to
// the question what they have.
func (l *Library) twin(ctx context.Context, workspace, identity string) (Revision, bool) {
	for _, v := range l.twins(workspace, identity) {
		if v, err := l.pinGood(ctx, v.ID); err == nil {
			return v, true
		}
	}
	return Revision{}, false
}

func (l *Library) twins(workspace, identity string) (list []Revision) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, r := range l.records {
		if r.Template.Workspace != workspace {
			continue
		}
		for _, v := range r.Template.Revisions {
			if v.Status == Ready && v.TreeDigest == identity && v.ImageDigest != "" {
				list = append(list, v)
			}
		}
	}
	return list
}

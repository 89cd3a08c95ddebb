package templates

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"holdfast/blockdev"
	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
)

// Contents come into an image by reflink or by copying. A reflink costs the more
// the more pieces there are (50 µs to 150 µs each), a clone of the image too, and
// so does each create from it. Copies lie in one piece.
const (
	// mostMoved pieces, each of at least leastMoved bytes, are shared with staging,
	// whose blocks nobody else has: that saves writing them once more.
	mostMoved  = 16
	leastMoved = 4 << 20
	// mostShared pieces, each of at least leastShared bytes, are shared with the
	// image of an earlier revision: that saves space for as long as both are there.
	mostShared  = 1024
	leastShared = 64 << 10
)

// piece is a range of an image's contents and where its bytes come from.
type piece struct {
	at     int64 // in the image
	store  int   // which of the files has them
	from   int64 // where in it
	length int64
	fresh  int64 // where the first file has the same bytes; -1: it does not
	clone  bool
}

func (p piece) end() int64 { return p.at + p.length }

// touches reports whether q goes on where p ends, in the image and in its file.
func (p piece) touches(q piece) bool {
	return p.store == q.store && p.end() == q.at && p.from+p.length == q.from
}

// continued reports whether q goes on where p ends, also in the first file.
func (p piece) continued(q piece) bool {
	return p.touches(q) && (p.fresh < 0 && q.fresh < 0 || p.fresh >= 0 && p.fresh+p.length == q.fresh)
}

// placing collects where an image wants its contents. It is ext4fill.Contents.
type placing struct {
	shares []share
	pieces []piece // ascending in the image
}

// Place takes a range, in parts where some of it is to be shared.
func (c *placing) Place(_ context.Context, _ *os.File, at int64, r tree.Run) error {
	if r.Store != 0 {
		c.add(piece{at: at, store: r.Store, from: r.At, length: r.Length, fresh: -1})
		return nil
	}
	end := r.At + r.Length
	i, _ := slices.BinarySearchFunc(c.shares, r.At, func(s share, at int64) int { return cmp.Compare(s.fresh+s.length-1, at) })
	for from := r.At; from < end; {
		p := piece{at: at + from - r.At, from: from, length: end - from, fresh: from}
		if i < len(c.shares) {
			s := c.shares[i]
			if s.fresh > from {
				p.length = min(p.length, s.fresh-from)
			} else {
				p.store, p.from, p.length = s.store, s.from+from-s.fresh, min(p.length, s.fresh+s.length-from)
				if from+p.length == s.fresh+s.length {
					i++
				}
			}
		}
		c.add(p)
		from += p.length
	}
	return nil
}

func (c *placing) add(p piece) {
	if n := len(c.pieces); n > 0 && c.pieces[n-1].continued(p) {
		c.pieces[n-1].length += p.length
		return
	}
	c.pieces = append(c.pieces, p)
}

// groups gives the pieces that touch, which can be cloned as one.
func (c *placing) groups() (groups [][]piece) {
	for i := 0; i < len(c.pieces); {
		n := 1
		for i+n < len(c.pieces) && c.pieces[i+n-1].touches(c.pieces[i+n]) {
			n++
		}
		groups = append(groups, c.pieces[i:i+n])
		i += n
	}
	return groups
}

func lengthOf(group []piece) int64 { return group[len(group)-1].end() - group[0].at }

// choose says which groups are cloned: the largest. The others are copied, from
// the first file where it has them.
func (c *placing) choose(most, least [2]int64) (cloned int64) {
	groups := c.groups()
	slices.SortStableFunc(groups, func(a, b []piece) int { return cmp.Compare(lengthOf(b), lengthOf(a)) })
	for _, g := range groups {
		kind, length := min(g[0].store, 1), lengthOf(g)
		if most[kind] == 0 || length < least[kind] || (g[0].at|g[0].from|length)%tree.Block != 0 {
			markCopied(g)
			continue
		}
		most[kind]--
		cloned += length
		for i := range g {
			g[i].clone = true
		}
	}
	return cloned
}

func markCopied(group []piece) {
	for i := range group {
		p := &group[i]
		p.clone = false
		if p.fresh >= 0 {
			p.store, p.from = 0, p.fresh
		}
	}
}

// chooseUsual is choose by the numbers that are good for a revision.
func (c *placing) chooseUsual() int64 {
	return c.choose([2]int64{mostMoved, mostShared}, [2]int64{leastMoved, leastShared})
}

// expect tells how many bytes will be cloned, before there is an image: as many
// as if nothing interrupted the contents.
func expect(t tree.Tree, shares []share) int64 {
	c := placing{shares: shares}
	at := int64(0)
	for i := range t.Nodes {
		for _, r := range t.Nodes[i].Runs {
			r.Length = roundUp(r.Length, tree.Block)
			_ = c.Place(context.Background(), nil, at, r) // never fails
			at += r.Length
		}
	}
	return c.chooseUsual()
}

// move brings the contents into the image. With dense, what is not shared lies in
// few pieces there, unused parts between contents included. What another image shares is compared
// with what came: what the records say of an image is not believed.
func (c *placing) move(ctx context.Context, image *os.File, files []*os.File, dense bool) error {
	buf := make([]byte, 2<<20)
	for _, g := range c.groups() {
		if err := cloneGroup(ctx, image, files, g, buf); err != nil {
			return err
		}
	}
	if dense {
		if err := c.allocate(image); err != nil {
			return err
		}
	}
	for _, p := range c.pieces {
		if p.clone {
			continue
		}
		if err := copyPiece(ctx, image, files[p.store], p, buf); err != nil {
			return err
		}
	}
	return nil
}

// cloneGroup shares what was chosen for it; what cannot be is copied later.
func cloneGroup(ctx context.Context, image *os.File, files []*os.File, group []piece, buf []byte) error {
	first := group[0]
	if !first.clone {
		return ctx.Err()
	}
	same := true
	for i := 0; same && i < len(group); i++ {
		p := group[i]
		if p.store == 0 || p.fresh < 0 {
			continue
		}
		var err error
		if same, err = equalRanges(ctx, files[0], p.fresh, files[p.store], p.from, p.length, buf); err != nil {
			return err
		}
	}
	if same {
		err := sys.CloneRange(image, first.at, files[first.store], first.from, lengthOf(group))
		if err == nil || !sys.IsNoReflink(err) {
			return spaceError(err)
		}
	}
	markCopied(group)
	return nil
}

// allocate gives what is not shared its space in few pieces.
func (c *placing) allocate(image *os.File) error {
	info, err := image.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	at := int64(0)
	for _, p := range append(slices.Clone(c.pieces), piece{at: info.Size(), clone: true}) {
		if !p.clone {
			continue
		}
		if p.at > at {
			if err := sys.Allocate(image, at, p.at-at); err != nil && !errors.Is(err, errors.ErrUnsupported) {
				return spaceError(err)
			}
		}
		at = p.end()
	}
	return nil
}

func spaceError(err error) error {
	if sys.IsNoSpace(err) {
		return fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	return err
}

func equalRanges(ctx context.Context, a *os.File, atA int64, b *os.File, atB, length int64, buf []byte) (bool, error) {
	half := int64(len(buf) / 2)
	for done := int64(0); done < length; done += half {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n := min(half, length-done)
		x, y := buf[:n], buf[half:half+n]
		if _, err := a.ReadAt(x, atA+done); err != nil {
			return false, err
		}
		if _, err := b.ReadAt(y, atB+done); err != nil && !errors.Is(err, io.EOF) {
			return false, err
		}
		if !bytes.Equal(x, y) {
			return false, nil
		}
	}
	return true, nil
}

// copyPiece writes what it reads: it never shares.
func copyPiece(ctx context.Context, image, from *os.File, p piece, buf []byte) error {
	for done := int64(0); done < p.length; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := from.ReadAt(buf[:min(int64(len(buf)), p.length-done)], p.from+done)
		if err != nil && (n == 0 || !errors.Is(err, io.EOF)) {
			return err
		}
		if _, err := image.WriteAt(buf[:n], p.at+done); err != nil {
			return spaceError(err)
		}
		done += int64(n)
	}
	return nil
}

// view reads an image, and what it shares from where it was taken: those bytes
// are in memory still.
type view struct {
	image  *os.File
	files  []*os.File
	pieces []piece
}

func (v view) ReadAt(b []byte, off int64) (n int, err error) {
	i, _ := slices.BinarySearchFunc(v.pieces, off, func(p piece, at int64) int { return cmp.Compare(p.end()-1, at) })
	for n < len(b) && err == nil {
		at := off + int64(n)
		for i < len(v.pieces) && (v.pieces[i].end() <= at || !v.pieces[i].clone) {
			i++
		}
		part, f, from := int64(len(b)-n), v.image, at
		if i < len(v.pieces) {
			p := v.pieces[i]
			switch {
			case p.at > at:
				part = min(part, p.at-at)
			case p.fresh >= 0:
				part, f, from = min(part, p.end()-at), v.files[0], p.fresh+at-p.at
			default:
				part, f, from = min(part, p.end()-at), v.files[p.store], p.from+at-p.at
			}
		}
		var got int
		got, err = f.ReadAt(b[n:n+int(part)], from)
		n += got
	}
	return n, err
}

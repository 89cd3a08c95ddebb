package tree

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"time"
)

// ErrDamaged: what was read is not the encoding of a Tree, or not as it was written.
var ErrDamaged = errors.New("not a tree")

// Bounds of what a single field can ask for, so that damage costs no memory.
const (
	maxText  = 1 << 16 // bytes of a name, a target, an attribute
	maxBlock = math.MaxInt64 / Block / 2
)

// Decode reads what Encode wrote, to its last byte. ErrDamaged when anything of
// it is not as it was, or is beyond the limits, which bound the memory that it
// takes (0: no limit). Nodes are in order; that their paths and attributes make
// sense is not looked at.
func Decode(r io.Reader, limits Limits) (t Tree, err error) {
	for n, err := range Scan(r, limits) {
		if err != nil {
			return Tree{}, err
		}
		t.Nodes = append(t.Nodes, *n)
	}
	return t, nil
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
}

type decoder struct {
	r    *bufio.Reader
	sum  hash.Hash
	one  [1]byte
	last string
	left Limits

	before string // path of the node before
}

// spend takes from a limit.
func spend(left *int64, n int64, what string) error {
	if *left -= n; *left < 0 {
		return damaged("more %s than allowed", what)
	}
	return nil
}

func (d *decoder) ReadByte() (byte, error) {
	b, err := d.r.ReadByte()
	if err == nil {
		d.one[0] = b
		d.sum.Write(d.one[:])
	}
	return b, err
}

func (d *decoder) bytes(b []byte) error {
	if _, err := io.ReadFull(d.r, b); err != nil {
		return err
	}
	d.sum.Write(b)
	return nil
}

func (d *decoder) number(most uint64) (uint64, error) {
	n, err := binary.ReadUvarint(d)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, damaged("a number: %w", err)
	}
	if err == nil && n > most {
		return 0, damaged("a number of %d, the most is %d", n, most)
	}
	return n, err
}

func (d *decoder) signed() (int64, error) {
	n, err := binary.ReadVarint(d)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, damaged("a number: %w", err)
	}
	return n, err
}

func (d *decoder) text() ([]byte, error) {
	n, err := d.number(maxText)
	if err == nil {
		err = spend(&d.left.Text, int64(n), "text") //nolint:gosec // checked
	}
	if err != nil {
		return nil, err
	}
	b := make([]byte, n)
	return b, d.bytes(b)
}

func (d *decoder) path() (string, error) {
	shared, err := d.number(uint64(len(d.last)))
	if err != nil {
		return "", err
	}
	rest, err := d.text()
	if err == nil {
		err = errors.Join(spend(&d.left.Entries, 1, "entries"), spend(&d.left.Text, int64(shared), "text")) //nolint:gosec // checked
	}
	d.last = d.last[:shared] + string(rest)
	return d.last, err
}

func (d *decoder) node(n *Node) (err error) {
	if n.Kind == 0 {
		return damaged("a node of no kind")
	}
	if n.Path, err = d.path(); err != nil {
		return err
	}
	var numbers [3]uint64
	for i, most := range []uint64{0o7777, math.MaxUint32, math.MaxUint32} {
		if numbers[i], err = d.number(most); err != nil {
			return err
		}
	}
	n.Mode, n.UID, n.GID = uint32(numbers[0]), uint32(numbers[1]), uint32(numbers[2]) //nolint:gosec // checked
	seconds, err := d.signed()
	if err != nil {
		return err
	}
	nanos, err := d.number(1e9 - 1)
	if err != nil {
		return err
	}
	n.ModTime = time.Unix(seconds, int64(nanos)).UTC() //nolint:gosec // checked
	for _, read := range []func(*Node) error{d.links, d.xattrs, d.contents} {
		if err := read(n); err != nil {
			return err
		}
	}
	return nil
}

func (d *decoder) links(n *Node) error {
	count, err := d.number(math.MaxInt32)
	for range count {
		l, err := d.path()
		if err != nil {
			return err
		}
		n.Links = append(n.Links, l)
	}
	d.last = n.Path
	return err
}

func (d *decoder) xattrs(n *Node) error {
	count, err := d.number(math.MaxInt32)
	for range count {
		name, err := d.text()
		if err != nil {
			return err
		}
		value, err := d.text()
		if err != nil {
			return err
		}
		n.Xattrs = append(n.Xattrs, Xattr{Name: string(name), Value: value})
	}
	return err
}

func (d *decoder) contents(n *Node) error {
	switch n.Kind {
	case Symlink:
		target, err := d.text()
		n.Target = string(target)
		return err
	case Regular:
		size, err := d.number(MaxFileBytes)
		if err != nil {
			return err
		}
		n.Size = int64(size) //nolint:gosec // checked
		if err := spend(&d.left.Bytes, n.Size, "bytes"); err != nil {
			return err
		}
		if err := d.digests(n); err != nil {
			return err
		}
		return d.runs(n)
	case Directory:
	}
	return nil
}

func (d *decoder) digests(n *Node) error {
	left := uint64((n.Size + Chunk - 1) / Chunk) //nolint:gosec // not negative
	for left > 0 {
		zeroes, err := d.number(left)
		if err != nil {
			return err
		}
		others, err := d.number(left - zeroes)
		if err != nil {
			return err
		}
		if zeroes+others == 0 {
			return damaged("no digests")
		}
		left -= zeroes + others
		n.Digests = append(n.Digests, make([]Digest, zeroes)...)
		for range others {
			var sum Digest
			if err := d.bytes(sum[:]); err != nil {
				return err
			}
			n.Digests = append(n.Digests, sum)
		}
	}
	return nil
}

func (d *decoder) runs(n *Node) error {
	count, err := d.number(math.MaxInt32)
	var end, at int64
	for range count {
		var r Run
		var numbers [3]uint64
		for i, most := range []uint64{maxBlock, uint64(n.Size), 1 << 16} { //nolint:gosec // not negative
			if numbers[i], err = d.number(most); err != nil {
				return err
			}
		}
		shift, err := d.signed()
		if err != nil {
			return err
		}
		if shift > maxBlock || shift < -maxBlock {
			return damaged("a run %d blocks away", shift)
		}
		r.Offset, r.Length, r.Store, r.At = end+int64(numbers[0])*Block, int64(numbers[1]), int(numbers[2]), at+shift*Block //nolint:gosec // checked
		if r.Length == 0 || r.Offset < end || r.At < 0 || r.Length > n.Size-r.Offset || r.Length%Block != 0 && r.Offset+r.Length != n.Size {
			return damaged("run %d+%d in a file of %d bytes", r.Offset, r.Length, n.Size)
		}
		end, at = r.Offset+roundUp64(r.Length), r.At+roundUp64(r.Length)
		n.Runs = append(n.Runs, r)
	}
	return err
}

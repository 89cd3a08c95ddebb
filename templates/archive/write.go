package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"holdfast/blockdev/tree"
)

// Chunks gives the contents of a tree's files.
type Chunks interface {
	// Chunk fills b with chunk k of n, which is not zero throughout. It is asked in
	// the order of the tree, each once.
	Chunk(ctx context.Context, n *tree.Node, k int, b []byte) error
}

// Write writes a tree as a plain tar: the same bytes for equal trees, wherever
// their contents lie. Read makes an equal tree of it. Names come in the order of
// the tree, the root as "./" first, further names of files as hard links.
// PAX records (pax(1)) are written where a header cannot say it: names that are
// long or not ASCII, times with nanoseconds, large numbers, extended attributes
// ("SCHILY.xattr."), and holes, in GNU's sparse format 1.0.
//
// Errors of w and c are returned as they are.
func Write(ctx context.Context, w io.Writer, t tree.Source, c Chunks) error {
	o := &tarWriter{w: w}
	err := tree.EachName(t, func(name string, n *tree.Node) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if name != n.Path {
			o.link(name, n)
			return o.err
		}
		segments := segmentsOf(n)
		o.header(n, segments)
		if o.err == nil && n.Kind == tree.Regular {
			o.err = writeContents(ctx, o, n, segments, c)
		}
		return o.err
	})
	if err != nil {
		return err
	}
	o.write(make([]byte, 2*blockSize))
	return o.err
}

// Length is how many bytes Write writes.
func Length(ctx context.Context, t tree.Source) (int64, error) {
	sum := counter(0)
	o := &tarWriter{w: &sum}
	err := tree.EachName(t, func(name string, n *tree.Node) error {
		if name != n.Path {
			o.link(name, n)
			return ctx.Err()
		}
		segments := segmentsOf(n)
		o.header(n, segments)
		if n.Kind == tree.Regular {
			sum += counter(padded(dataBytes(segments)))
		}
		return ctx.Err()
	})
	return int64(sum) + 2*blockSize, err
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

func padded(n int64) int64 { return (n + blockSize - 1) / blockSize * blockSize }

// segment is a range of a file that is written.
type segment struct{ offset, length int64 }

const (
	// leastHoles is how many bytes of holes make a file sparse in the archive.
	leastHoles = 16 << 10
	// mostSegments bounds the map of a sparse file; readers bound it too.
	mostSegments = 8192
)

// segmentsOf tells what of a file is written: its runs, or without those its
// chunks that are not zero; all of it when that leaves little out. Small holes are
// written when there would be too many segments.
func segmentsOf(n *tree.Node) []segment {
	if n.Kind != tree.Regular || n.Size == 0 {
		return nil
	}
	all := dataOf(n)
	for least := int64(tree.Block); len(all) > mostSegments; least *= 2 {
		all = joinSegments(all, least)
	}
	if n.Size-dataBytes(all) < leastHoles {
		return []segment{{0, n.Size}}
	}
	return all
}

func dataOf(n *tree.Node) (all []segment) {
	add := func(offset, length int64) {
		if k := len(all); k > 0 && all[k-1].offset+all[k-1].length == offset {
			all[k-1].length += length
			return
		}
		all = append(all, segment{offset, length})
	}
	if len(n.Runs) > 0 {
		for _, r := range n.Runs {
			add(r.Offset, r.Length)
		}
		return all
	}
	for k, d := range n.Digests {
		if d != (tree.Digest{}) {
			at := int64(k) * tree.Chunk
			add(at, min(tree.Chunk, n.Size-at))
		}
	}
	return all
}

func joinSegments(all []segment, least int64) []segment {
	out := all[:1]
	for _, s := range all[1:] {
		last := &out[len(out)-1]
		if s.offset-last.offset-last.length <= least {
			last.length = s.offset + s.length - last.offset
			continue
		}
		out = append(out, s)
	}
	return out
}

func dataBytes(all []segment) (n int64) {
	for _, s := range all {
		n += s.length
	}
	return n
}

// isSparse tells whether segments leave anything of a file out.
func isSparse(n *tree.Node, all []segment) bool {
	return n.Kind == tree.Regular && n.Size > 0 && !(len(all) == 1 && all[0] == segment{0, n.Size})
}

// sparseMap is what stands before the data of a sparse file.
func sparseMap(n *tree.Node, all []segment) []byte {
	if k := len(all); k == 0 || all[k-1].offset+all[k-1].length < n.Size {
		all = append(slices.Clone(all), segment{n.Size, 0})
	}
	b := strconv.AppendInt(nil, int64(len(all)), 10)
	for _, s := range all {
		b = strconv.AppendInt(append(b, '\n'), s.offset, 10)
		b = strconv.AppendInt(append(b, '\n'), s.length, 10)
	}
	b = append(b, '\n')
	return append(b, make([]byte, padded(int64(len(b)))-int64(len(b)))...)
}

// writeContents writes the segments of a file, a chunk at a time.
func writeContents(ctx context.Context, o *tarWriter, n *tree.Node, all []segment, c Chunks) error {
	var buf []byte
	loaded := -1
	for _, s := range all {
		for at := s.offset; at < s.offset+s.length; {
			k := int(at / tree.Chunk)
			begin := int64(k) * tree.Chunk
			end := min(begin+tree.Chunk, n.Size)
			if k != loaded {
				if err := ctx.Err(); err != nil {
					return err
				}
				buf = o.chunk[:end-begin]
				if err := load(ctx, n, k, buf, c); err != nil {
					return err
				}
				loaded = k
			}
			to := min(end, s.offset+s.length)
			o.write(buf[at-begin : to-begin])
			at = to
		}
	}
	data := dataBytes(all)
	o.write(make([]byte, padded(data)-data))
	return o.err
}

var errDigests = errors.New("a file without the digests of its chunks")

func load(ctx context.Context, n *tree.Node, k int, b []byte, c Chunks) error {
	if k >= len(n.Digests) {
		return fmt.Errorf("%w: %.120q", errDigests, n.Path)
	}
	if n.Digests[k] == (tree.Digest{}) {
		clear(b)
		return nil
	}
	return c.Chunk(ctx, n, k, b)
}

// tarWriter writes headers. Its first error sticks.
type tarWriter struct {
	w     io.Writer
	err   error
	chunk [tree.Chunk]byte
}

func (o *tarWriter) write(b []byte) {
	if o.err == nil && len(b) > 0 {
		_, o.err = o.w.Write(b)
	}
}

// Types of entries (pax(1), ustar).
const (
	typeRegular   = '0'
	typeLink      = '1'
	typeSymlink   = '2'
	typeDirectory = '5'
	typeExtended  = 'x'
)

// The largest numbers that a ustar field holds, which are octal text.
const (
	mostID   = 1<<21 - 1 // 7 digits
	mostSize = 1<<33 - 1 // 11 digits
)

func (o *tarWriter) header(n *tree.Node, segments []segment) {
	h := ustar{name: n.Path, mode: n.Mode, uid: n.UID, gid: n.GID, seconds: n.ModTime.Unix()}
	var records []string
	add := func(key, value string) { records = append(records, record(key, value)) }
	for _, x := range n.Xattrs {
		add(attrRecord+x.Name, string(x.Value))
	}
	var head []byte
	switch n.Kind {
	case tree.Directory:
		h.kind = typeDirectory
		h.name += "/"
	case tree.Symlink:
		h.kind, h.link = typeSymlink, n.Target
	case tree.Regular:
		h.kind, h.size = typeRegular, dataBytes(segments)
		if isSparse(n, segments) {
			head = sparseMap(n, segments)
			h.size += int64(len(head))
			add("GNU.sparse.major", "1")
			add("GNU.sparse.minor", "0")
			add("GNU.sparse.name", n.Path)
			add("GNU.sparse.realsize", strconv.FormatInt(n.Size, 10))
		}
	}
	if nanos := n.ModTime.Nanosecond(); nanos != 0 || h.seconds < 0 || h.seconds > mostSize {
		add("mtime", paxTime(h.seconds, nanos))
	}
	o.entry(h, records)
	o.write(head)
}

func (o *tarWriter) link(name string, n *tree.Node) {
	o.entry(ustar{
		kind: typeLink, name: name, link: n.Path, mode: n.Mode, uid: n.UID, gid: n.GID, seconds: n.ModTime.Unix(),
	}, nil)
}

// entry writes a header, behind an extended one if there is a need for it.
func (o *tarWriter) entry(h ustar, records []string) {
	if !fits(h.name) {
		records = append(records, record("path", h.name))
	}
	if !fits(h.link) {
		records = append(records, record("linkpath", h.link))
	}
	for _, number := range []struct {
		key         string
		value, most int64
	}{{"uid", int64(h.uid), mostID}, {"gid", int64(h.gid), mostID}, {"size", h.size, mostSize}} {
		if number.value > number.most {
			records = append(records, record(number.key, strconv.FormatInt(number.value, 10)))
		}
	}
	if len(records) > 0 {
		slices.SortFunc(records, func(a, b string) int { return strings.Compare(keyOf(a), keyOf(b)) })
		text := strings.Join(records, "")
		x := ustar{kind: typeExtended, name: "PaxHeaders/x", mode: 0o644, size: int64(len(text))}
		o.write(x.block())
		o.write([]byte(text))
		o.write(make([]byte, padded(x.size)-x.size))
	}
	o.write(h.block())
}

func keyOf(record string) string {
	_, rest, _ := strings.Cut(record, " ")
	key, _, _ := strings.Cut(rest, "=")
	return key
}

// fits tells whether a name does without an extended header.
func fits(name string) bool {
	return len(name) <= nameField && strings.IndexFunc(name, func(r rune) bool { return r >= 0x80 }) < 0
}

// record is a line of an extended header: its own length, a space, KEY=VALUE and
// a line feed.
func record(key, value string) string {
	rest := len(key) + len(value) + len(" =\n")
	size := rest + len(strconv.Itoa(rest))
	if len(strconv.Itoa(size)) > len(strconv.Itoa(rest)) {
		size = rest + len(strconv.Itoa(size))
	}
	return strconv.Itoa(size) + " " + key + "=" + value + "\n"
}

// paxTime is a time as a decimal number of seconds.
func paxTime(seconds int64, nanos int) string {
	sign := ""
	if seconds < 0 && nanos > 0 { // -1.5 s is -2 s and 500,000,000 ns
		seconds, nanos = seconds+1, 1_000_000_000-nanos
		if seconds == 0 {
			sign = "-"
		}
	}
	if nanos == 0 {
		return strconv.FormatInt(seconds, 10)
	}
	return sign + strconv.FormatInt(seconds, 10) + strings.TrimRight(fmt.Sprintf(".%09d", nanos), "0")
}

const nameField = 100

// ustar is a header block (pax(1), "ustar Interchange Format"). What does not fit
// is cut or 0: an extended header says it then.
type ustar struct {
	kind     byte
	name     string
	link     string
	mode     uint32
	uid, gid uint32
	size     int64
	seconds  int64
}

func (h ustar) block() []byte {
	b := make([]byte, blockSize)
	copy(b[:nameField], ascii(h.name))
	octal(b[100:108], int64(h.mode))
	octal(b[108:116], int64(h.uid))
	octal(b[116:124], int64(h.gid))
	octal(b[124:136], h.size)
	octal(b[136:148], h.seconds)
	b[156] = h.kind
	copy(b[157:157+nameField], ascii(h.link))
	copy(b[257:], "ustar\x0000")
	copy(b[148:156], "        ")
	sum := int64(0)
	for _, c := range b {
		sum += int64(c)
	}
	octal(b[148:155], sum)
	return b
}

// octal writes a number with leading zeroes and a NUL, 0 for one that does not fit.
func octal(field []byte, n int64) {
	digits := len(field) - 1
	if n < 0 || n>>(3*digits) != 0 {
		n = 0
	}
	copy(field, fmt.Sprintf("%0*o\x00", digits, n))
}

func ascii(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 0x80 {
			return '_'
		}
		return r
	}, s)
}

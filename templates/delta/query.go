package delta

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"holdfast/blockdev/tree"
)

// ErrMalformed: what came is not a query or a body of this package, or says what
// cannot be. The text says what is wrong.
var ErrMalformed = errors.New("not a delta")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrMalformed, fmt.Errorf(format, args...))
}

// Chunk is a chunk of a file in a tree that is not zero throughout.
type Chunk struct {
	Node  *tree.Node
	Index int
}

// Digest is the chunk's.
func (c Chunk) Digest() tree.Digest { return c.Node.Digests[c.Index] }

// Length is how many bytes the chunk has.
func (c Chunk) Length() int { return int(min(tree.Chunk, c.Node.Size-int64(c.Index)*tree.Chunk)) }

// Chunks gives all chunks of a tree, in its order, one that occurs twice twice.
func Chunks(t tree.Tree) []Chunk {
	var all []Chunk
	for i := range t.Nodes {
		n := &t.Nodes[i]
		for k, d := range n.Digests {
			if d != (tree.Digest{}) {
				all = append(all, Chunk{n, k})
			}
		}
	}
	return all
}

// Mark is a short form of a digest: its first 8 bytes.
type Mark uint64

// MarkOf is the mark of a digest.
func MarkOf(d tree.Digest) Mark { return Mark(binary.BigEndian.Uint64(d[:8])) }

// Query asks what of a tree a server has.
type Query struct {
	Identity string // of the tree: "sha256:..."
	Marks    []Mark // of Chunks
}

// NewQuery asks about a tree.
func NewQuery(t tree.Tree) Query {
	q := Query{Identity: t.Identity()}
	for _, c := range Chunks(t) {
		q.Marks = append(q.Marks, MarkOf(c.Digest()))
	}
	return q
}

const (
	queryLine    = "holdfast delta query 1\n"
	identityForm = "sha256:"
	identitySize = 32
	markSize     = 8
)

// MaxQuery is the largest query for so many chunks, in bytes.
func MaxQuery(chunks int64) int64 { return int64(len(queryLine)) + identitySize + chunks*markSize }

// Encode is the query as it travels: a line of text, the identity, the marks
// (big-endian).
func (q Query) Encode() ([]byte, error) {
	hexed, ok := strings.CutPrefix(q.Identity, identityForm)
	identity, err := hex.DecodeString(hexed)
	if !ok || err != nil || len(identity) != identitySize {
		return nil, malformed("identity %.80q", q.Identity)
	}
	b := append([]byte(queryLine), identity...)
	for _, m := range q.Marks {
		b = binary.BigEndian.AppendUint64(b, uint64(m))
	}
	return b, nil
}

// DecodeQuery reads what Encode made, of at most so many chunks.
func DecodeQuery(r io.Reader, chunks int64) (Query, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxQuery(chunks)+1))
	if err != nil {
		return Query{}, err
	}
	rest, ok := strings.CutPrefix(string(b), queryLine)
	switch {
	case int64(len(b)) > MaxQuery(chunks):
		return Query{}, malformed("a query about more than %d chunks", chunks)
	case !ok:
		return Query{}, malformed("a query begins with %q", queryLine)
	case len(rest) < identitySize || (len(rest)-identitySize)%markSize != 0:
		return Query{}, malformed("a query of %d bytes", len(b))
	}
	q := Query{Identity: identityForm + hex.EncodeToString([]byte(rest[:identitySize]))}
	for marks := rest[identitySize:]; marks != ""; marks = marks[markSize:] {
		q.Marks = append(q.Marks, Mark(binary.BigEndian.Uint64([]byte(marks[:markSize]))))
	}
	return q, nil
}

// Answer says what a server has of what a Query asked about.
type Answer struct {
	Same  bool // a version holds just this tree: nothing of it need be sent
	Known Bits // of the chunks, in the order of the query; may be wrong about some
}

// Bits are a list of booleans, the first in the lowest bit of the first byte.
type Bits []byte

// NewBits gives n bits that are all unset.
func NewBits(n int) Bits { return make(Bits, (n+7)/8) }

// Get tells bit i; those that are not there are unset.
func (b Bits) Get(i int) bool { return i/8 < len(b) && b[i/8]&(1<<(i%8)) != 0 }

// Set sets bit i, which is there.
func (b Bits) Set(i int) { b[i/8] |= 1 << (i % 8) }

// Any tells whether one is set.
func (b Bits) Any() bool {
	for _, x := range b {
		if x != 0 {
			return true
		}
	}
	return false
}

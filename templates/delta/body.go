package delta

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"

	"holdfast/blockdev/tree"
)

const (
	bodyLine = "holdfast delta 1\n"
	sameLine = "holdfast delta same 1\n"
	// maxPlan bounds the compressed tree, in bytes.
	maxPlan = 256 << 20
	// maxText bounds what names and attributes of a tree take, in bytes.
	maxText = 512 << 20
	// maxWindow bounds the memory of its decompression, in bytes.
	maxWindow = 8 << 20
)

// Body is what a client sends of a tree.
type Body struct {
	head   []byte // everything but contents
	chunks []Chunk
	sent   Bits
	length int64
	read   func(ctx context.Context, c Chunk, b []byte) error
}

// NewBody makes a body of a tree, of which the server has the chunks that are
// known; bits are as in an Answer. read gives the contents of the others, in order.
func NewBody(t tree.Tree, known Bits, read func(ctx context.Context, c Chunk, b []byte) error) (*Body, error) {
	plan, err := encodePlan(t)
	if err != nil {
		return nil, err
	}
	b := &Body{chunks: Chunks(t), read: read}
	b.sent = NewBits(len(b.chunks))
	for i, c := range b.chunks {
		if !known.Get(i) {
			b.sent.Set(i)
			b.length += int64(c.Length())
		}
	}
	b.head = binary.BigEndian.AppendUint64([]byte(bodyLine), uint64(len(plan)))
	b.head = append(append(b.head, plan...), b.sent...)
	b.length += int64(len(b.head))
	return b, nil
}

// NewSame makes the body for a tree that a version of the template holds already.
func NewSame(identity string) (*Body, error) {
	head, err := Query{Identity: identity}.Encode()
	if err != nil {
		return nil, err
	}
	b := &Body{head: append([]byte(sameLine), head[len(queryLine):]...)}
	b.length = int64(len(b.head))
	return b, nil
}

func encodePlan(t tree.Tree) ([]byte, error) {
	bare := tree.Tree{Nodes: make([]tree.Node, len(t.Nodes))}
	copy(bare.Nodes, t.Nodes)
	for i := range bare.Nodes {
		bare.Nodes[i].Runs = nil
	}
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(maxWindow))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(tree.Encode(w, bare), w.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// Length is how many bytes the body has.
func (b *Body) Length() int64 { return b.length }

// Write writes the body: exactly Length bytes, or an error.
func (b *Body) Write(ctx context.Context, w io.Writer) error {
	if _, err := w.Write(b.head); err != nil {
		return err
	}
	buf := make([]byte, tree.Chunk)
	for i, c := range b.chunks {
		if !b.sent.Get(i) {
			continue
		}
		part := buf[:c.Length()]
		if err := b.read(ctx, c, part); err != nil {
			return err
		}
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// Limits bound what a body may ask for.
type Limits struct {
	Bytes   int64 // of all files together, holes included
	Entries int64
}

// Received is a body that is being read.
type Received struct {
	Same string    // identity of the tree that the server is said to have; "": Tree is it
	Tree tree.Tree // without places: its contents come from Chunk

	r      io.Reader
	chunks []Chunk
	sent   Bits
	next   int
	have   func(ctx context.Context, d tree.Digest, b []byte) error
}

// Receive reads a body up to its contents, which Chunk gives then. r is read as
// far as it is needed; errors of r are returned as they are, ErrMalformed for what
// is not a body.
func Receive(r io.Reader, limits Limits) (*Received, error) {
	line, err := readLine(r)
	if err != nil {
		return nil, err
	}
	if line == sameLine {
		identity := make([]byte, identitySize)
		if err := readFull(r, identity); err != nil {
			return nil, err
		}
		return &Received{Same: identityForm + hex.EncodeToString(identity), r: r}, nil
	}
	if line != bodyLine {
		return nil, malformed("a body begins with %q", bodyLine)
	}
	var size [8]byte
	if err := readFull(r, size[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint64(size[:])
	if n > maxPlan {
		return nil, malformed("a tree of %d bytes, compressed: the most is %d", n, maxPlan)
	}
	in := &Received{r: r}
	if in.Tree, err = decodePlan(io.LimitReader(r, int64(n)), limits); err != nil {
		return nil, err
	}
	in.chunks = Chunks(in.Tree)
	in.sent = NewBits(len(in.chunks))
	return in, readFull(r, in.sent)
}

// readLine reads a line of text, which is short.
func readLine(r io.Reader) (string, error) {
	var line strings.Builder
	one := make([]byte, 1)
	for line.Len() < len(sameLine) {
		if err := readFull(r, one); err != nil {
			return "", err
		}
		line.WriteByte(one[0])
		if one[0] == '\n' {
			break
		}
	}
	return line.String(), nil
}

// readFull is io.ReadFull for which an end is always too early.
func readFull(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return malformed("it was cut off")
	}
	return err
}

func decodePlan(r io.Reader, limits Limits) (tree.Tree, error) {
	source := &sourceErrors{r: r}
	z, err := zstd.NewReader(source, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return tree.Tree{}, err
	}
	defer z.Close()
	t, err := tree.Decode(z, tree.Limits{Bytes: limits.Bytes, Entries: limits.Entries, Text: maxText})
	switch {
	case source.err != nil:
		return tree.Tree{}, source.err
	case err != nil:
		return tree.Tree{}, malformed("its tree: %w", err)
	}
	if _, err := io.Copy(io.Discard, source); err != nil {
		return tree.Tree{}, err
	}
	for i := range t.Nodes {
		if n := &t.Nodes[i]; len(n.Runs) > 0 {
			return tree.Tree{}, malformed("%.120q: a body says where contents lie", n.Path)
		}
	}
	last := ""
	return t, tree.EachName(t.Source(), func(name string, _ *tree.Node) error {
		if last != "" && tree.Compare(last, name) >= 0 {
			return malformed("%.120q comes twice", name)
		}
		last = name
		return nil
	})
}

// sourceErrors remembers an error that is not the data's fault.
type sourceErrors struct {
	r   io.Reader
	err error
}

func (s *sourceErrors) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		s.err = err
	}
	return n, err
}

// Missing tells the chunks that do not come with the body.
func (in *Received) Missing() []Chunk {
	var all []Chunk
	for i, c := range in.chunks {
		if !in.sent.Get(i) {
			all = append(all, c)
		}
	}
	return all
}

// From says where the chunks come from that are not in the body. have fills b with
// the chunk of a digest; what it gives is held against the digest by itself.
func (in *Received) From(have func(ctx context.Context, d tree.Digest, b []byte) error) {
	in.have = have
}

// ErrDigest: a chunk that came is not what its digest says.
var ErrDigest = errors.New("a chunk is not what its digest says")

// Chunk gives the chunks of the tree, each once and in order.
func (in *Received) Chunk(ctx context.Context, n *tree.Node, k int, b []byte) error {
	if in.next >= len(in.chunks) || in.chunks[in.next].Node != n || in.chunks[in.next].Index != k {
		return fmt.Errorf("delta: chunk %d of %.120q is asked for out of order", k, n.Path)
	}
	i := in.next
	in.next++
	if !in.sent.Get(i) {
		return in.have(ctx, n.Digests[k], b)
	}
	if err := readFull(in.r, b); err != nil {
		return err
	}
	if tree.DigestOf(b) != n.Digests[k] {
		return fmt.Errorf("%w: %w: chunk %d of %.120q", ErrMalformed, ErrDigest, k, n.Path)
	}
	return nil
}

// End checks that nothing follows the last chunk.
func (in *Received) End() error {
	n, err := io.ReadFull(in.r, make([]byte, 1))
	switch {
	case n > 0:
		return malformed("it goes on after its end")
	case errors.Is(err, io.EOF):
		return nil
	}
	return err
}

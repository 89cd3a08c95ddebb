package delta_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"holdfast/blockdev/tree"
	"holdfast/templates/delta"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// files makes a tree, and remembers its contents.
type files map[string][]byte

func (f files) tree(t testing.TB) tree.Tree {
	t.Helper()
	b := tree.NewBuilder()
	for name, body := range f {
		c := &tree.Content{Size: int64(len(body))}
		for part := range slices.Chunk(body, tree.Chunk) {
			c.Digests = append(c.Digests, tree.DigestOf(part))
		}
		must(t, b.File(name, tree.Attributes{Mode: 0o644}, c))
	}
	return b.Tree()
}

func (f files) read(_ context.Context, c delta.Chunk, b []byte) error {
	copy(b, f[c.Node.Path][c.Index*tree.Chunk:])
	return nil
}

func sample() files {
	r := rand.NewChaCha8([32]byte{7})
	random := func(n int) []byte {
		b := make([]byte, n)
		_, _ = r.Read(b)
		return b
	}
	return files{
		"a": random(100), "b": random(3*tree.Chunk + 17), "dir/empty": nil, "dir/zero": make([]byte, 2*tree.Chunk),
		"holes": append(make([]byte, tree.Chunk), random(tree.Chunk)...), "twice": random(5000), "z": random(1),
	}
}

func encode(t testing.TB, b *delta.Body) []byte {
	t.Helper()
	var out bytes.Buffer
	must(t, b.Write(t.Context(), &out))
	if int64(out.Len()) != b.Length() {
		t.Fatalf("%d bytes, %d were announced", out.Len(), b.Length())
	}
	return out.Bytes()
}

var limits = delta.Limits{Bytes: 1 << 30, Entries: 1000}

func TestQuery(t *testing.T) {
	tr := sample().tree(t)
	q := delta.NewQuery(tr)
	b, err := q.Encode()
	must(t, err)
	got, err := delta.DecodeQuery(bytes.NewReader(b), 100)
	must(t, err)
	if got.Identity != tr.Identity() || !slices.Equal(got.Marks, q.Marks) || len(q.Marks) != len(delta.Chunks(tr)) {
		t.Errorf("%+v, want %+v", got, q)
	}
	for what, bad := range map[string][]byte{
		"nothing": nil, "another line": []byte("GET / HTTP/1.1\r\n"), "cut off": b[:len(b)-1], "half an identity": b[:30], "too many": append(b, make([]byte, 8*100)...),
	} {
		if q, err := delta.DecodeQuery(bytes.NewReader(bad), 100); !errors.Is(err, delta.ErrMalformed) {
			t.Errorf("%s: %+v, %v", what, q, err)
		}
	}
}

// What the server lacks travels, and nothing else.
func TestBody(t *testing.T) {
	f := sample()
	tr := f.tree(t)
	chunks := delta.Chunks(tr)
	for _, knows := range [][]int{nil, {0}, {1, 2, 3}, {0, 1, 2, 3, 4, 5, 6, 7}} {
		known, store := delta.NewBits(len(chunks)), map[tree.Digest][]byte{}
		for _, i := range knows {
			if i < len(chunks) {
				known.Set(i)
				b := make([]byte, chunks[i].Length())
				must(t, f.read(t.Context(), chunks[i], b))
				store[chunks[i].Digest()] = b
			}
		}
		read := 0
		body, err := delta.NewBody(tr, known, func(ctx context.Context, c delta.Chunk, b []byte) error {
			read++
			return f.read(ctx, c, b)
		})
		must(t, err)
		b := encode(t, body)
		if read != len(chunks)-len(store) {
			t.Errorf("%d chunks were read of %d, %d are known", read, len(chunks), len(store))
		}
		in, err := delta.Receive(bytes.NewReader(b), limits)
		must(t, err)
		if in.Tree.Identity() != tr.Identity() || len(in.Missing()) != len(store) {
			t.Errorf("another tree, or %d missing, want %d", len(in.Missing()), len(store))
		}
		in.From(func(_ context.Context, d tree.Digest, b []byte) error { copy(b, store[d]); return nil })
		for _, c := range delta.Chunks(in.Tree) {
			got := make([]byte, c.Length())
			must(t, in.Chunk(t.Context(), c.Node, c.Index, got))
			if tree.DigestOf(got) != c.Digest() {
				t.Errorf("chunk %d of %s is wrong", c.Index, c.Node.Path)
			}
		}
		must(t, in.End())
	}
	same, err := delta.NewSame(tr.Identity())
	must(t, err)
	in, err := delta.Receive(bytes.NewReader(encode(t, same)), limits)
	if err != nil || in.Same != tr.Identity() {
		t.Errorf("%+v, %v", in, err)
	}
}

// drain takes all chunks of what was received.
func drain(ctx context.Context, in *delta.Received) error {
	in.From(func(context.Context, tree.Digest, []byte) error { return errors.New("not there") })
	for _, c := range delta.Chunks(in.Tree) {
		if err := in.Chunk(ctx, c.Node, c.Index, make([]byte, c.Length())); err != nil {
			return err
		}
	}
	return in.End()
}

func TestHostileBodies(t *testing.T) {
	f := sample()
	tr := f.tree(t)
	body, err := delta.NewBody(tr, nil, f.read)
	must(t, err)
	good := encode(t, body)
	const head = len("holdfast delta 1\n")
	planned := int(binary.BigEndian.Uint64(good[head:]))
	contents := head + 8 + planned + (len(delta.Chunks(tr))+7)/8
	flip := func(at int) []byte {
		b := slices.Clone(good)
		b[at] ^= 1
		return b
	}
	packed := func(plan []byte) []byte {
		var out bytes.Buffer
		w, err := zstd.NewWriter(&out)
		must(t, err)
		_, err = w.Write(plan)
		must(t, err, w.Close())
		b := binary.BigEndian.AppendUint64([]byte("holdfast delta 1\n"), uint64(out.Len()))
		return append(b, out.Bytes()...)
	}
	encoded := func(tr tree.Tree) []byte {
		var b bytes.Buffer
		must(t, tree.Encode(&b, tr))
		return b.Bytes()
	}
	many := tree.NewBuilder()
	for i := range 1001 {
		must(t, many.Directory(fmt.Sprint(i), tree.Attributes{}))
	}
	unordered := tree.Tree{Nodes: slices.Clone(tr.Nodes)}
	unordered.Nodes[1], unordered.Nodes[2] = unordered.Nodes[2], unordered.Nodes[1]
	doubled := tree.Tree{Nodes: slices.Clone(tr.Nodes)}
	doubled.Nodes[2] = doubled.Nodes[1]
	huge := tree.Tree{Nodes: slices.Clone(tr.Nodes)}
	huge.Nodes[1].Size = 1 << 50
	linked := tree.Tree{Nodes: slices.Clone(tr.Nodes)}
	linked.Nodes[1].Links = []string{linked.Nodes[1].Path}
	taken := tree.Tree{Nodes: slices.Clone(tr.Nodes)}
	taken.Nodes[1].Links = []string{taken.Nodes[2].Path}
	placed := tree.Tree{Nodes: slices.Clone(tr.Nodes)}
	placed.Nodes[1].Runs = []tree.Run{{Length: 100, At: 4096}}
	for what, bad := range map[string][]byte{
		"nothing": nil, "a tar": make([]byte, 1024), "only its line": good[:head], "a length without plan": good[:head+8],
		"half a plan": good[:head+8+planned/2], "no bits": good[:head+8+planned], "no contents": good[:contents],
		"half of the contents": good[:contents+5000], "one byte missing": good[:len(good)-1], "one byte more": append(slices.Clone(good), 0),
		"a changed plan": flip(head + 8 + planned/2), "a changed byte": flip(contents + 10), "the last byte changed": flip(len(good) - 1),
		"a huge length":  binary.BigEndian.AppendUint64([]byte("holdfast delta 1\n"), 1<<63),
		"a plan of text": packed([]byte("no tree")), "too many entries": packed(encoded(many.Tree())), "out of order": packed(encoded(unordered)),
		"a name twice": packed(encoded(doubled)), "a link to itself": packed(encoded(linked)), "a link over a file": packed(encoded(taken)), "a huge file": packed(encoded(huge)), "places": packed(encoded(placed)),
		"a bomb": packed(make([]byte, 64<<20)), "half an identity": []byte("holdfast delta same 1\nxxxx"),
	} {
		t.Run(strings.ReplaceAll(what, " ", "-"), func(t *testing.T) {
			in, err := delta.Receive(bytes.NewReader(bad), limits)
			if err == nil {
				err = drain(t.Context(), in)
			}
			if !errors.Is(err, delta.ErrMalformed) {
				t.Errorf("%v", err)
			}
		})
	}
	// What is not the body's fault is told apart.
	broken := errors.New("the connection was cut")
	for _, at := range []int{0, head + 4, head + 8 + planned/2, contents + 3} {
		in, err := delta.Receive(io.MultiReader(bytes.NewReader(good[:at]), failing{broken}), limits)
		if err == nil {
			err = drain(t.Context(), in)
		}
		if !errors.Is(err, broken) || errors.Is(err, delta.ErrMalformed) {
			t.Errorf("cut at %d: %v", at, err)
		}
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func FuzzReceive(f *testing.F) {
	s := files{"a": []byte("x"), "b": make([]byte, 5000)}
	body, err := delta.NewBody(s.tree(f), nil, s.read)
	must(f, err)
	f.Add(encode(f, body))
	f.Add([]byte("holdfast delta same 1\n0123456789abcdef0123456789abcdef"))
	f.Fuzz(func(t *testing.T, b []byte) {
		in, err := delta.Receive(bytes.NewReader(b), delta.Limits{Bytes: 1 << 20, Entries: 100})
		if err != nil {
			return
		}
		_ = drain(t.Context(), in)
	})
}

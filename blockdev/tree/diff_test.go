package tree_test

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev/tree"
)

// grown makes a tree by a function; errors end the test.
func grown(t *testing.T, grow func(b *tree.Builder) []error) tree.Tree {
	t.Helper()
	b := tree.NewBuilder()
	if err := errors.Join(grow(b)...); err != nil {
		t.Fatal(err)
	}
	return b.Tree()
}

func diffText(t *testing.T, a, b tree.Tree) string {
	t.Helper()
	var lines []string
	err := tree.Diff(a.Source(), b.Source(), func(c tree.Change) error {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s %v", c.Action, c.Path, c.Aspects)))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

func TestDiff(t *testing.T) {
	at := tree.Attributes{Mode: 0o644, ModTime: time.Unix(1, 1)}
	dir := tree.Attributes{Mode: 0o755, ModTime: time.Unix(9, 9)}
	content := func(s string) *tree.Content {
		return &tree.Content{Size: int64(len(s)), Digests: []tree.Digest{tree.DigestOf([]byte(s))}}
	}
	base := func(b *tree.Builder) []error {
		return []error{
			b.Directory(".", dir), b.Directory("d", dir), b.Directory("d-x", dir), b.File("d/a", at, content("a")), b.File("d/b", at, content("b")),
			b.File("d/linked", at, content("l")), b.Link("d-x/name", "d/linked"), b.Link("z", "d/linked"),
			b.Symlink("s", at, "target"), b.File("kind", at, content("k")), b.File("meta", at, content("m")),
		}
	}
	a := grown(t, base)
	if got := diffText(t, a, grown(t, base)); got != "" {
		t.Errorf("equal trees differ:\n%s", got)
	}
	changedAt := at
	changedAt.Mode, changedAt.UID, changedAt.ModTime, changedAt.Xattrs = 0o600, 7, time.Unix(1, 2), []tree.Xattr{{Name: "user.x", Value: []byte("y")}}
	b := grown(t, func(b *tree.Builder) []error {
		return []error{
			b.Directory(".", dir), b.Directory("d", dir), b.Directory("d-x", dir), b.File("d/a", at, content("A")), b.File("d/c", at, content("c")),
			b.File("d/linked", at, content("l")), b.Link("d-x/name", "d/linked"), b.Link("y", "d/linked"),
			b.Symlink("s", at, "elsewhere"), b.Symlink("kind", at, "x"), b.File("meta", changedAt, content("m")),
		}
	})
	want := `changed d/a [contents]
removed d/b []
added d/c []
changed d/linked [links]
changed d-x/name [links]
changed kind [kind]
changed meta [mode owner mtime xattrs]
changed s [target]
added y []
removed z []`
	if got := diffText(t, a, b); got != want {
		t.Errorf("%s\nwant:\n%s", got, want)
	}
	reversed := strings.NewReplacer("added", "removed", "removed", "added").Replace(want)
	if got := diffText(t, b, a); got != reversed {
		t.Errorf("backwards:\n%s\nwant:\n%s", got, reversed)
	}
	empty := grown(t, func(b *tree.Builder) []error { return []error{b.Directory(".", dir)} })
	if got := strings.Count(diffText(t, empty, a), "added"); got != 10 {
		t.Errorf("%d names were added, want 10", got)
	}
	stop := errors.New("enough")
	if err := tree.Diff(empty.Source(), a.Source(), func(tree.Change) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("an error does not end it: %v", err)
	}
}

// Where contents lie is no difference.
func TestDiffIgnoresPlaces(t *testing.T) {
	at := tree.Attributes{Mode: 0o644}
	with := func(where int64) tree.Tree {
		return grown(t, func(b *tree.Builder) []error {
			return []error{b.File("f", at, &tree.Content{Size: 9, Digests: []tree.Digest{{1}}, Runs: []tree.Run{{Length: 9, At: where}}})}
		})
	}
	if got := diffText(t, with(0), with(4096)); got != "" {
		t.Error(got)
	}
}

// Trees that are compared from where they are stored take no memory for their nodes.
func TestDiffOfManyIsBounded(t *testing.T) {
	const files = 60_000
	encoded := func(mode func(i int) uint32) []byte {
		b := tree.NewBuilder()
		for i := range files {
			if err := b.File(fmt.Sprintf("d%03d/f%06d", i%500, i), tree.Attributes{Mode: mode(i)}, &tree.Content{Size: 1, Digests: []tree.Digest{{byte(i), 1}}}); err != nil {
				t.Fatal(err)
			}
		}
		var out bytes.Buffer
		if err := tree.Encode(&out, b.Tree()); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	source := func(b []byte) tree.Source {
		return func() iter.Seq2[*tree.Node, error] { return tree.Scan(bytes.NewReader(b), tree.Limits{}) }
	}
	before := encoded(func(int) uint32 { return 0o644 })
	after := encoded(func(i int) uint32 { return 0o600 + uint32(i%2)*0o44 })
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	runtime.GC()
	base, most, n := heap(), uint64(0), 0
	err := tree.Diff(source(before), source(after), func(tree.Change) error {
		if n++; n%10_000 == 0 {
			most = max(most, heap())
		}
		return nil
	})
	if err != nil || n != files/2 {
		t.Errorf("%d changes, %v", n, err)
	}
	if used := int64(most) - int64(base); used > 16<<20 {
		t.Errorf("%d MiB for %d files", used>>20, files)
	}
	// Damage is noticed before anything is told.
	bad := bytes.Clone(after)
	bad[len(bad)/2] ^= 1
	err = tree.Diff(source(before), source(bad), func(tree.Change) error { t.Error("something was told"); return errors.New("stop") })
	if !errors.Is(err, tree.ErrDamaged) {
		t.Error(err)
	}
}

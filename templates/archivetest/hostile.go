package archivetest

import (
	"bytes"
	"fmt"
	"io"
	"slices"
)

// Bounds are those of the server that hostile archives are made for. Sizes are in
// bytes.
type Bounds struct {
	Bytes   int64 // of an archive, and of the files in it
	Entries int64
	Free    int64 // may be unpacked whatever the ratio
	Ratio   int64
}

// SmallBounds keep archives that break them small.
var SmallBounds = Bounds{Bytes: 4 << 20, Entries: 500, Free: 1 << 20, Ratio: 50}

// Case is an archive that must be refused.
type Case struct {
	Name   string
	Format string // as ?format= says; empty: the server looks
	Entry  string // that the refusal must name; empty: it is not one entry's fault
	Says   string // what else the refusal must say
	Make   func() []byte
	Stream func() io.Reader // instead of Make, for what is made while it is read
	Length int64            // of Stream
}

// Open gives the archive and its length.
func (c Case) Open() (io.Reader, int64) {
	if c.Stream != nil {
		return c.Stream(), c.Length
	}
	b := c.Make()
	return bytes.NewReader(b), int64(len(b))
}

// Hostile is the whole collection: every case once, by name. Cases about limits
// are made for l.
func Hostile(l Bounds) []Case {
	all := slices.Concat(
		paths(), links(), kinds(), numbers(), attributes(), headers(), sparse(l), limits(l), truncated(), nested(),
		gzips(l), zstds(l), zips(l), zipEntries(), layouts(l), layers(l), bombs(l),
	)
	seen := map[string]bool{}
	for _, c := range all {
		if seen[c.Name] {
			panic("two cases " + c.Name)
		}
		seen[c.Name] = true
	}
	return all
}

// plain is a case of a tar that the standard library can write.
func plain(name, entry, says string, entries ...Entry) Case {
	return Case{Name: "tar: " + name, Entry: entry, Says: says, Make: func() []byte { return Tar(entries...) }}
}

// blocks is a case of a tar made by hand.
func blocks(name, entry, says string, make func() []byte) Case {
	return Case{Name: "tar: " + name, Entry: entry, Says: says, Make: make}
}

// fixed is for archives that are made already.
func fixed(b []byte) func() []byte { return func() []byte { return b } }

// Million is a tar in a gzip with a million files, made while it is read: what a
// refusal by the number of entries costs a server is measured with it.
func Million() Case {
	c := Case{Name: "tar.gz: a million entries", Says: "entries", Format: "tar.gz"}
	b := zipped(func(w io.Writer) { manyFiles(w, 1_000_000) })
	c.Make = fixed(b)
	return c
}

func manyFiles(w io.Writer, n int) {
	for i := range n {
		_, err := w.Write(Raw(fmt.Sprintf("dir-%03d/file-%07d", i/1000, i), '0', 0, ""))
		must(err)
	}
	_, err := w.Write(make([]byte, 1024))
	must(err)
}

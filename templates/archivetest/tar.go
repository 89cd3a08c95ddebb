package archivetest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"
)

// Entry is one entry as it is to stand in a tar, right or wrong.
type Entry struct {
	tar.Header
	Body string
}

// must is for what cannot fail but by a mistake in a test.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// Tar packs entries with the standard library, which refuses what no tar can
// say; see Raw for what it does not want to say. A missing type is a file, a
// missing mode 0755.
func Tar(entries ...Entry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.Body))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		must(w.WriteHeader(&h))
		_, err := io.WriteString(w, e.Body)
		must(err)
	}
	must(w.Close())
	return b.Bytes()
}

// File is a file of one byte.
func File(name string) Entry { return Holding(name, "x") }

// Holding is a file with contents.
func Holding(name, body string) Entry { return Entry{tar.Header{Name: name}, body} }

// Dir is a directory.
func Dir(name string) Entry { return Entry{tar.Header{Name: name, Typeflag: tar.TypeDir}, ""} }

// Link is a hard link.
func Link(name, to string) Entry {
	return Entry{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}, ""}
}

// Symlink is a symbolic link.
func Symlink(name, to string) Entry {
	return Entry{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}, ""}
}

// Special is a device or a pipe.
func Special(name string, kind byte) Entry {
	return Entry{tar.Header{Name: name, Typeflag: kind, Devmajor: 1, Devminor: 3}, ""}
}

// With gives an entry an extended attribute.
func With(e Entry, name, value string) Entry {
	e.Format, e.PAXRecords = tar.FormatPAX, map[string]string{"SCHILY.xattr." + name: value}
	return e
}

// Raw makes an entry from its fields, with a right checksum unless change ruins
// it afterwards.
func Raw(name string, typeflag byte, size int64, body string, change ...func([]byte)) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00", size))
	copy(h[136:], "00000000000\x00")
	h[156] = typeflag
	copy(h[257:], "ustar\x0000")
	for _, fn := range change {
		fn(h)
	}
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	out := append(h, body...)
	return append(out, make([]byte, (512-len(body)%512)%512)...)
}

// Ended puts the mark behind blocks that ends a tar.
func Ended(blocks ...[]byte) []byte { return append(bytes.Join(blocks, nil), make([]byte, 1024)...) }

// PAX is an extended header with records "key=value".
func PAX(records ...string) []byte {
	var b strings.Builder
	for _, r := range records {
		n := len(r) + 3
		for len(fmt.Sprint(n))+len(r)+2 != n {
			n = len(fmt.Sprint(n)) + len(r) + 2
		}
		fmt.Fprintf(&b, "%d %s\n", n, r)
	}
	return Raw("pax", tar.TypeXHeader, int64(b.Len()), b.String())
}

// OldSparse is a sparse file in the old GNU format: all of it a hole.
func OldSparse(size int64) []byte {
	return Ended(Raw("sparse", tar.TypeGNUSparse, 0, "", func(h []byte) {
		copy(h[257:], "ustar  \x00")
		h[482] = 0
		h[483] = 0x80
		for i := range 8 {
			h[494-i] = byte(size >> (8 * i))
		}
		for i := 484; i < 487; i++ {
			h[i] = 0
		}
		// one region of no bytes at the end
		h[386] = 0x80
		for i := range 8 {
			h[397-i] = byte(size >> (8 * i))
		}
		copy(h[398:], "00000000000\x00")
	}))
}

// Times makes n entries.
func Times(n int, make func(i int) Entry) []Entry {
	list := []Entry{}
	for i := range n {
		list = append(list, make(i))
	}
	return list
}

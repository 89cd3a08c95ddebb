package format

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"holdfast/templates/archive"
	at "holdfast/templates/archivetest"
)

func read(t *testing.T, b []byte, f Format, l Limits) ([]byte, Format, error) {
	t.Helper()
	if l.Bytes == 0 {
		l.Bytes = 1 << 30
	}
	dir := t.TempDir()
	s, err := Open(t.Context(), iotest.HalfReader(bytes.NewReader(b)), Options{Format: f, Staging: dir, Limits: l})
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	out, err := io.ReadAll(s)
	if left, rerr := os.ReadDir(dir); rerr != nil || len(left) > 0 {
		t.Errorf("staging: %v, %v", left, rerr)
	}
	return out, s.Format, err
}

// One tar, packed in every way, comes out as it was.
func TestCompressed(t *testing.T) {
	plain := at.Tar(at.Dir("d"), at.Holding("d/f", strings.Repeat("contents ", 50_000)), at.Symlink("s", "d/f"))
	half := len(plain) / 2
	skippable := []byte("\x50\x2a\x4d\x18\x04\x00\x00\x00abcd")
	for name, c := range map[string]struct {
		b    []byte
		want Format
	}{
		"plain":                       {plain, Tar},
		"gzip":                        {at.Gzip(plain), Gzip},
		"gzip of members":             {append(at.Gzip(plain[:half]), at.Gzip(plain[half:])...), Gzip},
		"gzip with an empty member":   {append(append(at.Gzip(plain[:half]), at.Gzip(nil)...), at.Gzip(plain[half:])...), Gzip},
		"gzip filled up":              {append(at.Gzip(plain), make([]byte, 9999)...), Gzip},
		"zstd":                        {at.Zstd(plain), Zstd},
		"zstd of frames":              {append(at.Zstd(plain[:half]), at.Zstd(plain[half:])...), Zstd},
		"zstd with a skippable frame": {append(append(bytes.Clone(skippable), at.Zstd(plain)...), skippable...), Zstd},
		"zstd filled up":              {append(at.Zstd(plain), make([]byte, 10_240)...), Zstd},
	} {
		for _, asked := range []Format{Auto, c.want} {
			got, f, err := read(t, c.b, asked, Limits{})
			if err != nil || f != c.want || !bytes.Equal(got, plain) {
				t.Errorf("%s, asked for %q: %d bytes as %q, %v", name, asked, len(got), f, err)
			}
		}
	}
}

// A tar is never mistaken for anything else, whatever its first name is.
func TestTarComesFirst(t *testing.T) {
	for _, magic := range []string{"\x1f\x8b\x08\x01", "\x28\xb5\x2f\xfd", "PK\x03\x04", "PK\x05\x06", "\x50\x2a\x4d\x18"} {
		v7 := func(h []byte) { copy(h[257:], make([]byte, 8)) }
		for name, b := range map[string][]byte{
			"ustar": at.Ended(at.Raw(magic+"name", tar.TypeReg, 0, "")), "old tar": at.Ended(at.Raw(magic+"name", tar.TypeReg, 0, "", v7)),
			"pax": at.Tar(at.Entry{Header: tar.Header{Name: magic + "name", Format: tar.FormatPAX}}), "gnu": at.Tar(at.Entry{Header: tar.Header{Name: magic + "name", Format: tar.FormatGNU}}),
		} {
			got, f, err := read(t, b, Auto, Limits{})
			if err != nil || f != Tar || !bytes.Equal(got, b) {
				t.Errorf("%q in a %s: %q, %v", magic, name, f, err)
			}
		}
	}
	for name, b := range map[string][]byte{"nothing": nil, "zeroes": make([]byte, 1024), "text": []byte("hello"), "a long text": bytes.Repeat([]byte("hello "), 200)} {
		if got, f, err := read(t, b, Auto, Limits{}); err != nil || f != Tar || !bytes.Equal(got, b) {
			t.Errorf("%s: %q, %v", name, f, err) // what is wrong with it a tar's reader says
		}
	}
}

func TestZip(t *testing.T) {
	b := at.Zip(
		at.Moded(at.Stored("d/", ""), 0o042750), at.Deflated("d/f", bytes.Repeat([]byte("x"), 5000)), at.Moded(at.Stored("s", "d/f"), 0o120777), at.Moded(at.Stored("tool", "#!"), 0o104755),
		at.ZipEntry{Name: "plain"}, at.ZipEntry{Name: "folder/"}, at.Moded(at.Stored(`back\slash`, "1"), 0o100600), at.Stored("\xff\xfe", "not UTF-8"),
	)
	got, f, err := read(t, b, Auto, Limits{})
	if err != nil || f != Zip {
		t.Fatalf("%q, %v", f, err)
	}
	want := map[string]tar.Header{
		"d/": {Typeflag: tar.TypeDir, Mode: 0o2750}, "d/f": {Typeflag: tar.TypeReg, Mode: 0o644, Size: 5000}, "s": {Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: "d/f"},
		"tool": {Typeflag: tar.TypeReg, Mode: 0o4755, Size: 2}, "plain": {Typeflag: tar.TypeReg, Mode: 0o644}, "folder/": {Typeflag: tar.TypeDir, Mode: 0o755},
		`back\slash`: {Typeflag: tar.TypeReg, Mode: 0o600, Size: 1}, "\xff\xfe": {Typeflag: tar.TypeReg, Mode: 0o644, Size: 9},
	}
	for in := tar.NewReader(bytes.NewReader(got)); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		w, ok := want[h.Name]
		if !ok || h.Typeflag != w.Typeflag || h.Mode != w.Mode || h.Size != w.Size || h.Linkname != w.Linkname {
			t.Errorf("%q: %+v", h.Name, h)
		}
		delete(want, h.Name)
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
	if got, f, err := read(t, at.Zip(), Auto, Limits{}); err != nil || f != Zip || len(got) != 1024 {
		t.Errorf("an empty one: %d bytes, %q, %v", len(got), f, err)
	}
}

// The ratio is not looked at below Free, and ends the reading soon above it.
func TestRatio(t *testing.T) {
	packed := at.Gzip(make([]byte, 8<<20)) // about 1000:1
	for name, c := range map[string]struct {
		limits Limits
		refuse bool
	}{
		"free":             {Limits{Free: 9 << 20, Ratio: 2}, false},
		"within the ratio": {Limits{Free: 1, Ratio: 2000}, false},
		"above":            {Limits{Free: 1 << 20, Ratio: 100}, true},
		"too large":        {Limits{Bytes: 4 << 20, Free: 1 << 30}, true},
		"defaults":         {Limits{}, false},
	} {
		got, _, err := read(t, packed, Gzip, c.limits)
		if errors.Is(err, archive.ErrRefused) != c.refuse || len(got) > 5<<20 && c.refuse {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// An error of the source is the source's, wherever it comes.
func TestSourceFails(t *testing.T) {
	broken := errors.New("broken")
	plain := at.Tar(at.Holding("f", strings.Repeat("some contents", 3000)))
	for name, b := range map[string][]byte{"tar": plain, "gzip": at.Gzip(plain), "zstd": at.Zstd(plain), "zip": at.Zip(at.Deflated("f", plain))} {
		for n := 0; n < len(b); n += 1 + len(b)/50 {
			s, err := Open(t.Context(), io.MultiReader(bytes.NewReader(b[:n]), iotest.ErrReader(broken)), Options{Staging: t.TempDir(), Limits: Limits{Bytes: 1 << 20}})
			if err == nil {
				_, err = io.Copy(io.Discard, s)
				_ = s.Close()
			}
			if !errors.Is(err, broken) || errors.Is(err, archive.ErrRefused) {
				t.Fatalf("%s after %d bytes: %v", name, n, err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Open(ctx, bytes.NewReader(b), Options{Staging: t.TempDir()}); !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a dead context: %v", name, err)
		}
	}
}

func TestParse(t *testing.T) {
	for _, name := range []string{"", "tar", "tar.gz", "tar.zst", "zip", "oci"} {
		if f, err := Parse(name); err != nil || string(f) != name {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"rar", "TAR", "tgz", " tar"} {
		if _, err := Parse(name); err == nil {
			t.Errorf("%q is taken", name)
		}
	}
}

// Whatever it is fed, a decoder gives a tar's bytes, refuses, or ends.
func FuzzOpen(f *testing.F) {
	for _, c := range at.Hostile(at.SmallBounds) {
		if c.Make != nil && c.Format != "oci" {
			if b := c.Make(); len(b) < 10_000 {
				f.Add(b)
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l := Limits{Bytes: 1 << 20, Entries: 100, Free: 1 << 16, Ratio: 10}
		got, kind, err := read(t, b, Auto, l)
		if err != nil && !errors.Is(err, archive.ErrRefused) {
			t.Errorf("an error that is not a refusal: %v", err)
		}
		if kind != Tar && int64(len(got)) > l.Bytes+1<<20 {
			t.Errorf("%d bytes came out", len(got))
		}
	})
}

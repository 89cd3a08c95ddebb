package archivetest

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"

	"github.com/klauspost/compress/zstd"
)

// zeroes is a reader without end.
type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// zipped is a gzip of what fn writes.
func zipped(fn func(io.Writer)) []byte {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	must(err)
	fn(w)
	must(w.Close())
	return out.Bytes()
}

// standard is a zstd of what fn writes.
func standard(fn func(io.Writer), o ...zstd.EOption) []byte {
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, append(o, zstd.WithEncoderConcurrency(1))...)
	must(err)
	fn(w)
	must(w.Close())
	return out.Bytes()
}

// zeroFile writes a tar of one file of n zeroes.
func zeroFile(n int64) func(io.Writer) {
	return func(w io.Writer) {
		_, err := w.Write(Raw("zeroes", '0', n, ""))
		must(err)
		_, err = io.Copy(w, io.LimitReader(zeroes{}, (n+511)/512*512+1024))
		must(err)
	}
}

// noise does not compress; it is the same each time.
func noise(n int) string {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // noise
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

func gzips(Bounds) []Case {
	inner := Tar(Holding("first", "1"), Holding("noise", noise(20_000)), Holding("last", "2"))
	good := Gzip(inner)
	change := func(at int, b byte) func() []byte {
		return func() []byte {
			c := bytes.Clone(good)
			c[(at+len(c))%len(c)] ^= b
			return c
		}
	}
	c := func(name, says string, make func() []byte) Case {
		return Case{Name: "tar.gz: " + name, Says: says, Make: make}
	}
	list := []Case{
		c("wrong checksum", "checksum", change(-5, 1)),
		c("wrong length", "checksum", change(-1, 1)),
		c("damaged in the middle", "tar.gz", change(10_000, 0xff)),
		c("unknown method", "not a tar.gz", change(2, 0xf0)),
		c("garbage behind the end", "something else behind its end", func() []byte { return append(bytes.Clone(good), "garbage, and more"...) }),
		c("seven bytes behind the end", "something else behind its end", func() []byte { return append(bytes.Clone(good), "garbage"...) }),
		c("something behind zeroes behind the end", "something else behind its end", func() []byte { return append(append(bytes.Clone(good), make([]byte, 5120)...), 1) }),
		c("a plain tar behind the end", "something else behind its end", func() []byte { return append(bytes.Clone(good), inner...) }),
		c("second member is cut off", "cut off", func() []byte { return append(Gzip(inner[:512]), Gzip(inner[512:])[:300]...) }),
		c("second member is cut off in its header", "cut off", func() []byte { return append(Gzip(inner[:512]), Gzip(inner[512:])[:5]...) }),
		c("second member is damaged", "checksum", func() []byte { b := append(Gzip(inner[:512]), Gzip(inner[512:])...); b[len(b)-6] ^= 1; return b }),
		c("empty members without a tar", "empty", func() []byte { return bytes.Repeat(Gzip(nil), 100) }),
		{Name: "tar.gz: a parent inside", Entry: "../evil", Says: `".."`, Make: func() []byte { return Gzip(Tar(File("../evil"))) }},
		{Name: "tar.gz: a device inside", Entry: "null", Says: "device", Make: func() []byte { return Gzip(Tar(Special("null", '3'))) }},
		{Name: "tar.gz: below a symlink", Entry: "s/x", Says: "below", Make: func() []byte { return Gzip(Tar(Symlink("s", "/"), File("s/x"))) }},
		c("cut off in the tar", "cut off", func() []byte { return Gzip(inner[:1000]) }),
	}
	for _, n := range []int{2, 3, 9, 10, 11, 100, len(good) / 2, len(good) - 9, len(good) - 8, len(good) - 4, len(good) - 1} {
		list = append(list, c(fmt.Sprintf("cut after %d bytes", n), "cut off", fixed(good[:n])))
	}
	return list
}

func zstds(Bounds) []Case {
	inner := Tar(Holding("first", "1"), Holding("noise", noise(20_000)), Holding("last", "2"))
	good := Zstd(inner, zstd.WithEncoderCRC(true))
	c := func(name, says string, make func() []byte) Case {
		return Case{Name: "tar.zst: " + name, Says: says, Make: make}
	}
	// RFC 8878, 3.1.1: magic, a descriptor without single segment, a window descriptor
	window := func(exponent byte) func() []byte {
		return func() []byte { return append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, exponent << 3}, 0x03, 0, 0, 'x') }
	}
	list := []Case{
		c("wrong checksum", "tar.zst", func() []byte { b := bytes.Clone(good); b[len(b)-1] ^= 1; return b }),
		c("damaged in the middle", "tar.zst", func() []byte { b := bytes.Clone(good); b[len(b)/2] ^= 0xff; return b }),
		c("a window of 64 MiB", "window", window(16)),
		c("a window of 2 GiB", "window", window(21)),
		c("a window of terabytes", "window", window(31)),
		c("one segment of 3 GiB", "window", func() []byte { return []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0xc0, 0x03, 0, 0, 'x'} }),
		c("a reserved block", "tar.zst", func() []byte { return []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x20, 0x07, 0, 0} }),
		c("an unknown dictionary", "tar.zst", func() []byte { return []byte{0x28, 0xb5, 0x2f, 0xfd, 0x01, 0x20, 0x77, 0x03, 0, 0, 'x'} }),
		c("a reserved bit", "tar.zst", func() []byte { b := bytes.Clone(good); b[4] |= 0x08; return b }),
		c("garbage behind the end", "something else behind its end", func() []byte { return append(bytes.Clone(good), "garbage!"...) }),
		c("a plain tar behind the end", "something else behind its end", func() []byte { return append(bytes.Clone(good), inner...) }),
		c("second frame is cut off", "cut off", func() []byte { return append(Zstd(inner[:512]), Zstd(inner[512:])[:300]...) }),
		c("skippable frames alone", "empty", func() []byte { return bytes.Repeat([]byte("\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"), 100) }),
		c("a skippable frame of gigabytes", "cut off", func() []byte { return []byte("\x50\x2a\x4d\x18\xff\xff\xff\xff") }),
		{Name: "tar.zst: a parent inside", Entry: "../evil", Says: `".."`, Make: func() []byte { return Zstd(Tar(File("../evil"))) }},
		{Name: "tar.zst: a pipe inside", Entry: "p", Says: "pipe", Make: func() []byte { return Zstd(Tar(Special("p", '6'))) }},
		c("cut off in the tar", "cut off", func() []byte { return Zstd(inner[:1000]) }),
	}
	for _, n := range []int{4, 5, 8, 12, 100, len(good) / 2, len(good) - 4, len(good) - 1} {
		list = append(list, c(fmt.Sprintf("cut after %d bytes", n), "cut off", fixed(good[:n])))
	}
	return list
}

// bombs unpack to much more than they are.
func bombs(l Bounds) []Case {
	if l.Bytes > 64<<20 {
		return nil
	}
	const says = "times its size"
	much := min(l.Bytes-1<<20, 4*l.Free)
	doubled := func(pack func([]byte) []byte) func() []byte {
		return func() []byte { return pack(pack(zipped(zeroFile(much)))) }
	}
	layer := func(t string, blob []byte, n int64) Layer {
		var tar bytes.Buffer
		zeroFile(n)(&tar)
		return Layer{Tar: tar.Bytes(), Blob: blob, Type: t}
	}
	return []Case{
		{Name: "tar.gz: ratio bomb", Says: says, Make: func() []byte { return zipped(zeroFile(much)) }},
		{Name: "tar.zst: ratio bomb", Says: says, Make: func() []byte { return standard(zeroFile(much)) }},
		{Name: "tar.gz: ratio bomb behind the end of the tar", Says: says, Make: func() []byte {
			return zipped(func(w io.Writer) { _, err := w.Write(Tar(File("a"))); must(err); zeroFile(much)(w) })
		}},
		{Name: "tar.gz: ratio bomb in many members", Says: says, Make: func() []byte {
			return append(Gzip(Raw("zeroes", '0', much, "")), bytes.Repeat(zipped(func(w io.Writer) { _, err := io.Copy(w, io.LimitReader(zeroes{}, 1<<16)); must(err) }), int(much>>16)+1)...)
		}},
		{Name: "tar.zst: ratio bomb of repeated bytes", Says: says, Make: func() []byte {
			// frames whose one block says: a byte, 128 KiB times
			rle := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x58, 0x03, 0x00, 0x10, 'x'}
			return append(Zstd(Raw("zeroes", '0', much, "")), bytes.Repeat(rle, int(much>>17)+1)...)
		}},
		{Name: "tar.gz: a PAX header that unpacks to megabytes", Says: "longer than 1 MiB", Make: func() []byte {
			return zipped(func(w io.Writer) {
				_, err := w.Write(Raw("pax", 'x', 2<<20, ""))
				must(err)
				_, err = io.Copy(w, io.LimitReader(zeroes{}, 2<<20))
				must(err)
			})
		}},
		{Name: "tar.gz: larger than the limit", Says: "", Make: func() []byte { return zipped(zeroFile(l.Bytes + 1)) }},
		{Name: "tar.zst: larger than the limit", Says: "", Make: func() []byte { return standard(zeroFile(l.Bytes + 1)) }},
		{Name: "tar.gz: larger than the limit, at a low ratio", Says: "larger than", Make: func() []byte {
			body := noise(64 << 10)
			return zipped(func(w io.Writer) {
				for i := int64(0); i <= l.Bytes>>16; i++ {
					_, err := w.Write(Raw(fmt.Sprint(i), '0', int64(len(body)), body))
					must(err)
				}
			})
		}},
		{Name: "tar.gz: a bomb in a bomb", Says: "gzip file", Make: doubled(Gzip)},
		{Name: "oci: a layer that is a ratio bomb", Format: "oci", Says: says, Make: func() []byte {
			return NewLayout(layer("application/vnd.oci.image.layer.v1.tar+gzip", zipped(zeroFile(much)), much)).Tar()
		}},
		{Name: "oci: a zstd layer that is a ratio bomb", Format: "oci", Says: says, Make: func() []byte {
			return NewLayout(layer("application/vnd.oci.image.layer.v1.tar+zstd", standard(zeroFile(much)), much)).Tar()
		}},
		{Name: "oci: layers that are too much together", Format: "oci", Says: "unpacks to more than", Make: func() []byte {
			var layers []Layer
			for i := range int64(20) {
				layers = append(layers, Gzipped(Holding(fmt.Sprint(i), noise(int(l.Bytes/16)))))
			}
			return NewLayout(layers...).Tar()
		}},
		{Name: "zip: ratio bomb", Says: says, Entry: "zeroes", Make: func() []byte { return Zip(Deflated("zeroes", make([]byte, much))) }},
		{Name: "zip: ratio bomb in many entries", Says: says, Make: func() []byte {
			var list []ZipEntry
			for i := range 20 {
				list = append(list, Deflated(fmt.Sprint(i), make([]byte, l.Free/8)))
			}
			return Zip(list...)
		}},
	}
}

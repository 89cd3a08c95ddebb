package archivetest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
)

func zipCase(name, entry, says string, make func() []byte) Case {
	return Case{Name: "zip: " + name, Entry: entry, Says: says, Make: make}
}

// zips are wrong as a whole.
func zips(l Bounds) []Case {
	two := []ZipEntry{Stored("a", "first"), Deflated("b", []byte(strings.Repeat("second", 100)))}
	good := Zip(two...)
	with := func(e ZipEnd) func() []byte { return func() []byte { return ZipWith(e, two...) } }
	list := []Case{
		zipCase("something behind the end", "", "behind its end", func() []byte { return append(bytes.Clone(good), "garbage"...) }),
		zipCase("another zip behind the end", "", "does not lie", func() []byte { return append(bytes.Clone(good), Zip(Stored("c", "third"))...) }),
		zipCase("a comment that is shorter than it says", "", "behind its end", func() []byte { b := ZipWith(ZipEnd{Comment: "abc"}, two...); return b[:len(b)-1] }),
		zipCase("an end inside the comment", "", "", func() []byte { return ZipWith(ZipEnd{Comment: string(Zip())}, two...) }),
		zipCase("no end", "", "no end", with(ZipEnd{Signature: 0x06054b51})),
		zipCase("more entries than it has", "", "entries", with(ZipEnd{Records: p[uint16](3)})),
		zipCase("fewer entries than it has", "", "entries", with(ZipEnd{Records: p[uint16](1)})),
		zipCase("65535 entries said", "", "", with(ZipEnd{Records: p[uint16](65535)})),
		zipCase("a directory beyond the end", "", "does not lie", with(ZipEnd{Offset: p[uint32](1 << 30)})),
		zipCase("a directory of the largest size", "", "does not lie", with(ZipEnd{Size: p[uint32](1<<32 - 2)})),
		zipCase("a directory of size 0", "", "does not lie", with(ZipEnd{Size: p[uint32](0)})),
		zipCase("a directory elsewhere", "", "does not lie", with(ZipEnd{Offset: p[uint32](0)})),
		zipCase("one of several parts", "", "several parts", with(ZipEnd{Disk: 1})),
		zipCase("bytes between directory and end", "", "does not lie", with(ZipEnd{Before: []byte("bytes")})),
		zipCase("a Zip64 locator that leads nowhere", "", "Zip64", with(ZipEnd{Records: p[uint16](65535), Before: locator(1 << 40)})),
		zipCase("a Zip64 end of exabytes", "", "does not lie", func() []byte {
			return ZipWith(ZipEnd{Records: p[uint16](65535), Before: zip64(good, 2, 1<<62, 1<<62)}, two...)
		}),
		zipCase("a Zip64 end with a million entries", "", "entries", func() []byte {
			at, size := directoryOf(good)
			return ZipWith(ZipEnd{Records: p[uint16](65535), Before: zip64(good, 1_000_000, size, at)}, two...)
		}),
		zipCase("an extension before the first entry", "", "", func() []byte { return append([]byte("PK\x03\x04 this is not what it seems"), good...) }),
		zipCase("nothing but the magic", "", "no end", func() []byte { return []byte("PK\x03\x04") }),
		zipCase("noise behind the magic", "", "no end", func() []byte { return []byte("PK\x03\x04" + noise(100_000)) }),
		zipCase("a directory of wrong signature", "", "directory", func() []byte { e := Stored("a", "x"); e.DirSignature = 0x02014b51; return Zip(e) }),
	}
	if l.Entries <= 10_000 {
		list = append(list, zipCase("too many entries", "", "entries", func() []byte {
			var all []ZipEntry
			for i := range l.Entries + 1 {
				all = append(all, Stored(fmt.Sprint(i), "x"))
			}
			return Zip(all...)
		}))
	}
	for _, n := range []int{10, 29, 31, 36, len(good) / 2, len(good) - 60, len(good) - 22, len(good) - 1} {
		list = append(list, zipCase(fmt.Sprintf("cut after %d bytes", n), "", "", fixed(good[:n])))
	}
	return list
}

// directoryOf tells where the directory of two entries is.
func directoryOf(b []byte) (at, size uint64) {
	end := b[len(b)-22:]
	return uint64(binary.LittleEndian.Uint32(end[16:])), uint64(binary.LittleEndian.Uint32(end[12:]))
}

func locator(at uint64) []byte {
	var b bytes.Buffer
	put(&b, uint32(0x07064b50), uint32(0), at, uint32(1))
	return b.Bytes()
}

func zip64(good []byte, records, size, offset uint64) []byte {
	at, have := directoryOf(good)
	var b bytes.Buffer
	put(&b, uint32(0x06064b50), uint64(44), uint16(45), uint16(45), uint32(0), uint32(0), records, records, size, offset)
	return append(b.Bytes(), locator(at+have)...)
}

// zipEntries are wrong one by one.
func zipEntries() []Case {
	one := func(name, entry, says string, e ...ZipEntry) Case {
		return zipCase(name, entry, says, func() []byte { return Zip(e...) })
	}
	changed := func(name, says string, fn func(*ZipEntry)) Case {
		e := Deflated("entry", []byte(strings.Repeat("data", 100)))
		fn(&e)
		return one(name, "entry", says, Stored("before", "x"), e)
	}
	first := Stored("a", strings.Repeat("shared bytes", 20))
	again := Stored("b", "x")
	again.NoLocal, again.Offset = true, p[uint32](0)
	list := []Case{
		one("parent", "../evil", `".."`, Stored("../evil", "x")),
		one("parent in the middle", "a/../../evil", `".."`, Stored("a/../../evil", "x")),
		one("absolute", "/etc/passwd", "absolute", Stored("/etc/passwd", "x")),
		one("backslashes", "..", `\`, func() ZipEntry { e := Stored(`..\..\evil`, "x"); e.Creator = 0; return e }()),
		one("NUL in a name", "", "NUL", Stored("a\x00b", "x")),
		one("empty name", "", "empty name", Stored("", "x")),
		one("name of 256 bytes", "nnn", "longer than 255", Stored(strings.Repeat("n", 256), "x")),
		one("the same name twice", "a", "twice", Stored("a", "1"), Stored("a", "2")),
		one("the same name in two spellings", "./a", "twice", Stored("a", "1"), Stored("./a", "2")),
		one("file and directory of one name", "a/", "twice", Stored("a", "1"), Moded(Stored("a/", ""), 0o040755)),
		one("below a symlink", "s/x", below, Moded(Stored("s", "/etc"), 0o120777), Stored("s/x", "1")),
		one("below a file", "f/x", below, Stored("f", "1"), Stored("f/x", "1")),
		one("symlink without a target", "s", "without a target", Moded(Stored("s", ""), 0o120777)),
		one("symlink of 4096 bytes", "s", "longer than", Moded(Stored("s", strings.Repeat("x", 4096)), 0o120777)),
		one("symlink of a megabyte", "s", "longer than", Moded(Deflated("s", make([]byte, 1<<20)), 0o120777)),
		one("symlink with a NUL byte", "s", "", Moded(Stored("s", "a\x00b"), 0o120777)),
		one("character device", "null", "device", Moded(Stored("null", ""), 0o020666)),
		one("block device", "sda", "device", Moded(Stored("sda", ""), 0o060666)),
		one("pipe", "pipe", "pipe", Moded(Stored("pipe", ""), 0o010666)),
		one("socket", "sock", "no known type", Moded(Stored("sock", ""), 0o140666)),
		one("directory with contents", "d/", "a directory with", Moded(Stored("d/", "contents"), 0o040755)),
		one("directory by name, file by mode", "d/", "by its name", Moded(Stored("d/", ""), 0o100644)),
		one("directory by name, symlink by mode", "d/", "by its name", Moded(Stored("d/", "/etc"), 0o120777)),
		one("entries that share their bytes", "b", "", first, again),
		one("an entry inside another's data", "inner", "", func() []ZipEntry {
			inner := Stored("inner", "x")
			inner.NoLocal = true
			outer := Stored("outer", string(Zip(Stored("inner", "x"))))
			inner.Offset = p(uint32(30 + len("outer")))
			return []ZipEntry{outer, inner}
		}()...),
		one("an entry that reaches into the directory", "a", "overlaps", func() ZipEntry {
			e := Stored("a", "x")
			e.Packed, e.LocalPacked, e.Size = p[uint32](40), p[uint32](40), 40
			return e
		}()),
		changed("encrypted", "encrypted", func(e *ZipEntry) { e.Flags = 1 }),
		changed("strongly encrypted", "encrypted", func(e *ZipEntry) { e.Flags = 1 << 6 }),
		changed("directory encrypted", "encrypted", func(e *ZipEntry) { e.Flags = 1 << 13 }),
		changed("method 12, bzip2", "method 12", func(e *ZipEntry) { e.Method = 12 }),
		changed("method 99, AES", "method 99", func(e *ZipEntry) { e.Method = 99 }),
		changed("another local name", "different names", func(e *ZipEntry) { e.LocalName = "enter" }),
		changed("another local method", "differ in flags or method", func(e *ZipEntry) { e.LocalMethod = p[uint16](0) }),
		changed("other local flags", "differ in flags or method", func(e *ZipEntry) { e.LocalFlags = p[uint16](1 << 11) }),
		changed("another local checksum", "differ in size or checksum", func(e *ZipEntry) { e.LocalCRC = p(e.CRC + 1) }),
		changed("another local size", "differ in size or checksum", func(e *ZipEntry) { e.LocalSize = p(e.Size + 1) }),
		changed("another local compressed size", "differ in size or checksum", func(e *ZipEntry) { e.LocalPacked = p(uint32(len(e.Data)) - 1) }),
		changed("no local header", "no local header", func(e *ZipEntry) { e.Offset = p[uint32](3) }),
		changed("a local header in the directory", "no place", func(e *ZipEntry) { e.Offset = p[uint32](1 << 20) }),
		changed("a Zip64 offset that is not there", "no place", func(e *ZipEntry) { e.Offset = p[uint32](1<<32 - 1) }),
		changed("wrong checksum", "checksum", func(e *ZipEntry) { e.CRC++ }),
		changed("longer than said", "", func(e *ZipEntry) { e.Size -= 10 }),
		changed("shorter than said", "", func(e *ZipEntry) { e.Size += 10 }),
		changed("terabytes said", "", func(e *ZipEntry) { e.Size = 1<<32 - 2 }),
		changed("stored, with two sizes", "two different sizes", func(e *ZipEntry) { e.Method = 0 }),
		changed("no deflate stream", "", func(e *ZipEntry) { e.Data = []byte(noise(100)) }),
		changed("cut deflate stream", "", func(e *ZipEntry) { e.Data = e.Data[:len(e.Data)/2] }),
		changed("on another disk", "another volume", func(e *ZipEntry) { e.Disk = 3 }),
	}
	return list
}

package archivetest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strings"
	"time"
)

const (
	maxDepth = 128
	below    = "lies below"
	kindOf   = "where an earlier entry is"
)

// paths lead out of the tree, or are none.
func paths() []Case {
	deep := strings.Repeat("d/", maxDepth)
	list := []Case{
		blocks("empty name", "", "empty name", func() []byte { return Ended(Raw("", tar.TypeReg, 0, "")) }),
		blocks("NUL in a PAX name", "", "not a tar header", func() []byte { return Ended(PAX("path=a\x00b"), Raw("a", tar.TypeReg, 0, "")) }),
		blocks("absolute path in PAX", "/etc/passwd", "absolute path", func() []byte { return Ended(PAX("path=/etc/passwd"), Raw("innocent", tar.TypeReg, 0, "")) }),
		blocks("parent in PAX", "../evil", `".."`, func() []byte { return Ended(PAX("path=../evil"), Raw("innocent", tar.TypeReg, 0, "")) }),
		blocks("parent in a GNU long name", "x/../../evil", `".."`, func() []byte {
			return Ended(Raw("././@LongLink", 'L', 13, "x/../../evil\x00"), Raw("innocent", tar.TypeReg, 0, ""))
		}),
		blocks("parent in a ustar prefix", "../evil", `".."`, func() []byte {
			return Ended(Raw("evil", tar.TypeReg, 0, "", func(h []byte) { copy(h[345:], "..") }))
		}),
		blocks("absolute ustar prefix", "/etc/evil", "absolute path", func() []byte {
			return Ended(Raw("evil", tar.TypeReg, 0, "", func(h []byte) { copy(h[345:], "/etc") }))
		}),
		plain("file as root", ".", "cannot be the root", File(".")),
		plain("symlink as root", "./", "cannot be the root", Symlink("./", "/")),
		plain("hard link as root", ".", "cannot be the root", File("f"), Link(".", "f")),
		plain("name of 256 bytes", "nnnn", "longer than 255", File(strings.Repeat("n", 256))),
		plain("name of 256 bytes in the middle", "a/nnnn", "longer than 255", File("a/"+strings.Repeat("n", 256)+"/b")),
		plain("path of 4097 bytes", "pppp", "longer than 4096", File(strings.Repeat(strings.Repeat("p", 199)+"/", 21)+"x")),
		plain("too deep", "d/d/d", "deeper than", File(deep+"x")),
		plain("directory too deep", "d/d/d", "deeper than", Dir(deep+"x/")),
	}
	for _, name := range []string{"/etc/passwd", "//etc/passwd", "/./x", "/../x", "/tmp/x y"} {
		list = append(list, plain("absolute path "+name, name, "absolute path", File(name)),
			plain("absolute symlink "+name, name, "absolute path", Symlink(name, "x")))
	}
	for _, name := range []string{"../evil", "a/../../evil", "..", "./../evil", "a/..", "a/b/../../../evil", "./a/./../b", "a/../b", "....//../x"} {
		list = append(list, plain("parent in "+name, name, `".."`, File(name)), plain("directory with a parent "+name, name, `".."`, Dir(name)))
	}
	return list
}

// links lead elsewhere, to each other, or are written through.
func links() []Case {
	return []Case{
		plain("below a symlink", "s/passwd", below, Symlink("s", "/etc"), File("s/passwd")),
		plain("below a relative symlink", "s/x", below, Symlink("s", "../.."), File("s/x")),
		plain("below a symlink that stays inside", "s/x", below, Dir("d"), Symlink("s", "d"), File("s/x")),
		plain("far below a symlink", "d/s/etc/cron.d/x", below, Dir("d"), Symlink("d/s", "/"), File("d/s/etc/cron.d/x")),
		plain("directory below a symlink", "s/x", below, Symlink("s", "/tmp"), Dir("s/x")),
		plain("symlink below a symlink", "s/x", below, Symlink("s", "/tmp"), Symlink("s/x", "y")),
		plain("hard link below a symlink", "s/x", below, File("f"), Symlink("s", "/tmp"), Link("s/x", "f")),
		plain("below a symlink to itself", "s/x", below, Symlink("s", "s"), File("s/x")),
		plain("below a chain of symlinks", "c/x", below, Symlink("a", "/"), Symlink("b", "a"), Symlink("c", "b"), File("c/x")),
		plain("below a file", "f/x", below, File("f"), File("f/x")),
		plain("below a hard link", "h/x", below, File("f"), Link("h", "f"), File("h/x")),
		plain("below a link to a symlink", "h/x", below, Symlink("s", "/"), Link("h", "s"), File("h/x")),
		plain("symlink becomes directory", "s", kindOf, Symlink("s", "/etc"), Dir("s"), File("s/passwd")),
		plain("directory becomes symlink", "d", kindOf, Dir("d"), Symlink("d", "/etc")),
		plain("filled directory becomes symlink", "d", kindOf, Dir("d"), File("d/x"), Symlink("d", "/etc"), File("d/passwd")),
		plain("implied directory becomes symlink", "d", kindOf, File("d/x"), Symlink("d", "/etc")),
		plain("file becomes symlink", "f", kindOf, File("f"), Symlink("f", "/etc/passwd")),
		plain("symlink becomes file", "f", kindOf, Symlink("f", "/etc/passwd"), File("f")),
		plain("symlink becomes file by another spelling", "f", kindOf, Symlink("f", "/etc/passwd"), File("./f")),
		plain("file becomes directory", "f", kindOf, File("f"), Dir("f")),
		plain("directory becomes file", "d", kindOf, Dir("d"), File("d")),
		plain("hard link over symlink", "s", kindOf, File("f"), Symlink("s", "/etc"), Link("s", "f")),
		plain("hard link over directory", "d", kindOf, File("f"), Dir("d"), Link("d", "f")),
		plain("symlink over hard link", "h", kindOf, File("f"), Link("h", "f"), Symlink("h", "/etc")),
		plain("hard link outside", "h", `".."`, Link("h", "../../etc/shadow")),
		plain("hard link to absolute", "h", "absolute path", Link("h", "/etc/shadow")),
		plain("hard link to the future", "h", "not an earlier entry", Link("h", "f"), File("f")),
		plain("hard link to nothing", "h", "not an earlier entry", Link("h", "nothing")),
		plain("hard link to itself", "h", "to itself", Link("h", "./h")),
		plain("two hard links to each other", "a", "not an earlier entry", Link("a", "b"), Link("b", "a")),
		plain("hard link to a directory", "h", "to the directory", Dir("d"), Link("h", "d")),
		plain("hard link to an implied directory", "h", "to the directory", File("d/x"), Link("h", "d")),
		plain("hard link to the root", "h", "to the directory", Link("h", ".")),
		plain("hard link through a symlink", "h", "not an earlier entry", Symlink("s", "/etc"), Link("h", "s/passwd")),
		plain("hard link to a name of 256 bytes", "h", "longer than 255", Link("h", strings.Repeat("n", 256))),
		blocks("hard link to absolute in PAX", "h", "absolute path", func() []byte { return Ended(PAX("linkpath=/etc/passwd"), Raw("h", tar.TypeLink, 0, "")) }),
		blocks("empty hard link", "h", "empty name", func() []byte { return Ended(Raw("h", tar.TypeLink, 0, "")) }),
		blocks("empty symlink", "s", "without a target", func() []byte { return Ended(Raw("s", tar.TypeSymlink, 0, "")) }),
		plain("symlink of 4096 bytes", "s", "longer than 4095", Symlink("s", strings.Repeat("x", 4096))),
	}
}

// kinds are entries that no template holds.
func kinds() []Case {
	list := []Case{
		plain("character device", "null", "device nodes", Special("null", tar.TypeChar)),
		plain("block device", "sda", "device nodes", Special("sda", tar.TypeBlock)),
		plain("fifo", "pipe", "named pipes", Special("pipe", tar.TypeFifo)),
		plain("device in a directory", "dev/kmem", "device nodes", Dir("dev"), Special("dev/kmem", tar.TypeChar)),
		plain("device over a file", "f", "device nodes", File("f"), Special("f", tar.TypeBlock)),
		plain("hard link to a device", "null", "device nodes", Special("null", tar.TypeChar), Link("h", "null")),
	}
	for _, kind := range "ZVMNDAI89" {
		list = append(list, blocks(fmt.Sprintf("entry of type %c", kind), "a", fmt.Sprintf("type '%c'", kind), func() []byte { return Ended(Raw("a", byte(kind), 0, "")) }))
	}
	return list
}

func numbers() []Case {
	field := func(name, entry, says string, at int, value string) Case {
		return blocks(name, entry, says, func() []byte { return Ended(Raw("a", tar.TypeReg, 0, "", func(h []byte) { copy(h[at:], value) })) })
	}
	return []Case{
		field("negative size", "", "not a tar header", 124, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"),
		field("size that is no number", "", "not a tar header", 124, "lots of it\x00\x00"),
		field("mode that is no number", "", "not a tar header", 100, "rwxr-x\x00"),
		field("negative owner", "a", "owner", 108, "\xff\xff\xff\xff\xff\xff\xff\xfe"),
		field("owner -1", "a", "owner", 108, "\x80\x00\x00\x00\xff\xff\xff\xff"),
		field("owner above 32 bits", "a", "owner", 108, "\x80\x00\x00\x01\x00\x00\x00\x00"),
		field("group above 32 bits", "a", "owner", 116, "\x80\x00\x00\x01\x00\x00\x00\x00"),
		blocks("negative owner in PAX", "a", "owner", func() []byte { return Ended(PAX("uid=-5"), Raw("a", tar.TypeReg, 0, "")) }),
		blocks("owner in PAX that is no number", "", "not a tar header", func() []byte { return Ended(PAX("uid=root"), Raw("a", tar.TypeReg, 0, "")) }),
		blocks("negative size in PAX", "", "not a tar header", func() []byte { return Ended(PAX("size=-1"), Raw("a", tar.TypeReg, 0, "")) }),
		blocks("time in PAX that is no number", "", "not a tar header", func() []byte { return Ended(PAX("mtime=now"), Raw("a", tar.TypeReg, 0, "")) }),
		blocks("time in PAX beyond all years", "a", "modification time", func() []byte { return Ended(PAX("mtime=99999999999999"), Raw("a", tar.TypeReg, 0, "")) }),
		plain("year 9999", "a", "modification time", Entry{Header: tar.Header{Name: "a", ModTime: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)}}),
		plain("year 1800", "a", "modification time", Entry{Header: tar.Header{Name: "a", Format: tar.FormatGNU, ModTime: time.Date(1800, 1, 1, 0, 0, 0, 0, time.UTC)}}),
	}
}

func attributes() []Case {
	acl := Entry{Header: tar.Header{Name: "a", Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.acl.access": "user::rwx,group::r-x,other::r-x"}}}
	many := Entry{Header: tar.Header{Name: "a", Format: tar.FormatPAX, PAXRecords: map[string]string{}}}
	for i := range 200 {
		many.PAXRecords[fmt.Sprintf("SCHILY.xattr.user.n%d", i)] = strings.Repeat("v", 10)
	}
	const foreign = "is not one of"
	return []Case{
		plain("attribute of no namespace", "a", foreign, With(File("a"), "color", "x")),
		plain("attribute security.ima", "a", foreign, With(File("a"), "security.ima", "x")),
		plain("attribute security.evm", "a", foreign, With(File("a"), "security.evm", "x")),
		plain("capability on a directory", "a", foreign, With(Dir("a"), "security.capability", "x")),
		plain("capability on a symlink", "a", foreign, With(Symlink("a", "b"), "security.capability", "x")),
		plain("attribute system.x", "a", foreign, With(File("a"), "system.data", "x")),
		plain("default ACL on a file", "a", foreign, With(File("a"), "system.posix_acl_default", "x")),
		plain("ACL on a symlink", "a", foreign, With(Symlink("a", "b"), "system.posix_acl_access", "x")),
		plain("user attribute on a symlink", "s", "on a symbolic link", With(Symlink("s", "x"), "user.a", "x")),
		plain("attribute user.", "a", foreign, With(File("a"), "user.", "x")),
		plain("attribute trusted.", "a", foreign, With(File("a"), "trusted.", "x")),
		plain("attribute name of 256 bytes", "a", "longer than 255", With(File("a"), "user."+strings.Repeat("n", 251), "x")),
		plain("attributes of 64 KiB", "a", "the most is", With(File("a"), "user.big", strings.Repeat("v", 65536))),
		plain("200 attributes", "a", "the most is", many),
		plain("ACL as text", "a", "ACL as text", acl),
	}
}

// headers are what a tar reader must not swallow.
func headers() []Case {
	good := Tar(File("a"), File("b"))
	damaged := bytes.Clone(good)
	damaged[1024+10] ^= 1
	pax := func(body string) func() []byte {
		return func() []byte {
			return Ended(Raw("pax", tar.TypeXHeader, int64(len(body)), body), Raw("a", tar.TypeReg, 0, ""))
		}
	}
	global := func(record string) func() []byte {
		return func() []byte {
			n := len(record) + 4
			return Ended(Raw("g", tar.TypeXGlobalHeader, int64(n), fmt.Sprintf("%d %s\n", n, record)), Raw("a", tar.TypeReg, 0, ""))
		}
	}
	const bad = "not a tar header"
	return []Case{
		blocks("PAX header above 1 MiB", "", "longer than 1 MiB", func() []byte {
			return Ended(PAX("comment="+strings.Repeat("c", 2<<20)), Raw("a", tar.TypeReg, 0, ""))
		}),
		blocks("PAX header of gigabytes, not sent", "", "cut off", func() []byte { return Ended(Raw("pax", tar.TypeXHeader, 1<<32, "")) }),
		blocks("PAX header of exabytes, not sent", "", "", func() []byte {
			return Ended(Raw("pax", tar.TypeXHeader, 0, "", func(h []byte) { copy(h[124:], "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff") }))
		}),
		blocks("GNU long name above 1 MiB", "", "longer than 1 MiB", func() []byte {
			return Ended(Raw("x", 'L', 2<<20, strings.Repeat("n", 2<<20)), Raw("a", tar.TypeReg, 0, ""))
		}),
		blocks("GNU long link above 1 MiB", "", "longer than 1 MiB", func() []byte {
			return Ended(Raw("x", 'K', 2<<20, strings.Repeat("n", 2<<20)), Raw("a", tar.TypeSymlink, 0, ""))
		}),
		blocks("GNU long name of 5000 bytes", "nnnn", "longer than 4096", func() []byte {
			return Ended(Raw("x", 'L', 5000, strings.Repeat("n", 5000)), Raw("a", tar.TypeReg, 0, ""))
		}),
		blocks("PAX record without a number", "", bad, pax("xx a=b\n\n")),
		blocks("PAX record without an end", "", bad, pax("8 a=bcd")),
		blocks("PAX record without a value", "", bad, pax("6 abc\n")),
		blocks("PAX record longer than its header", "", bad, pax("999 a=b\n")),
		blocks("PAX record of negative length", "", bad, pax("-8 a=b\n")),
		blocks("PAX record of overflowing length", "", bad, pax("99999999999999999999 a=b\n")),
		blocks("PAX header with nothing behind it", "", "cut off", func() []byte { return PAX("path=x") }),
		blocks("global path", "g", "global header", global("path=/evil")),
		blocks("global size", "g", "global header", global("size=9999")),
		blocks("global owner", "g", "global header", global("uid=0000")),
		blocks("wrong checksum", "a", bad, fixed(damaged)),
		blocks("text", "", bad, func() []byte { return bytes.Repeat([]byte("This is no archive.\n"), 100) }),
		blocks("short text", "", "cut off", func() []byte { return []byte("hello") }),
		blocks("nothing at all", "", "empty (0 bytes)", func() []byte { return nil }),
		blocks("one byte", "", "cut off", func() []byte { return []byte{0} }),
		blocks("half an end mark", "", "", func() []byte { return make([]byte, 511) }),
		blocks("garbage between entries", "a", bad, func() []byte {
			return bytes.Join([][]byte{good[:1024], bytes.Repeat([]byte("garbage!"), 64), good[1024:]}, nil)
		}),
		blocks("a zip inside the tar's end", "b", bad, func() []byte {
			return append(bytes.Clone(good[:2048]), append([]byte("PK\x03\x04"), make([]byte, 1020)...)...)
		}),
	}
}

// sparse files say that they are larger than the disk, or have maps that lie.
func sparse(l Bounds) []Case {
	old := func(name, says string, size int64) Case {
		return blocks(name, "sparse", says, func() []byte { return OldSparse(size) })
	}
	pax := func(name, says, body string, records ...string) Case {
		return blocks(name, "", says, func() []byte {
			return Ended(PAX(records...), Raw("GNUSparseFile.0/s", tar.TypeReg, int64(len(body)), body))
		})
	}
	const bad = "not a tar header"
	data := strings.Repeat("x", 512)
	size := func(n int64) string { return fmt.Sprint(n) }
	over := l.Bytes + 1
	return []Case{
		old("old GNU sparse file of exabytes", "the most is", 8_000_000_000_000_000_000),
		old("old GNU sparse file over the limit", "larger than", over),
		pax("PAX sparse 0.0 of exabytes", "the most is", data, "GNU.sparse.size=8000000000000000000", "GNU.sparse.numblocks=1", "GNU.sparse.offset=0", "GNU.sparse.numbytes=512"),
		pax("PAX sparse 0.0 over the limit", "larger than", data, "GNU.sparse.size="+size(over), "GNU.sparse.numblocks=1", "GNU.sparse.offset=0", "GNU.sparse.numbytes=512"),
		pax("PAX sparse 0.1 of exabytes", "the most is", data, "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.name=s", "GNU.sparse.size=8000000000000000000", "GNU.sparse.numblocks=1", "GNU.sparse.map=0,512"),
		pax("PAX sparse 0.1 over the limit", "larger than", data, "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.name=s", "GNU.sparse.size="+size(over), "GNU.sparse.numblocks=1", "GNU.sparse.map=0,512"),
		pax("PAX sparse 1.0 of exabytes", "the most is", pad("1\n0\n512\n")+data, "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=8000000000000000000"),
		pax("PAX sparse 1.0 over the limit", "larger than", pad("1\n0\n512\n")+data, "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize="+size(over)),
		pax("PAX sparse 1.0 with a name that leads out", `".."`, pad("1\n0\n512\n")+data, "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=../evil", "GNU.sparse.realsize=512"),
		pax("PAX sparse 1.0 with a map of a billion regions", "", pad("1000000000\n0\n1\n")+data, "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=512"),
		pax("PAX sparse 1.0 without a map", "", data, "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=512"),
		pax("PAX sparse 1.0 with a map without an end", "", strings.Repeat("1", 512), "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=512"),
		pax("PAX sparse 0.1, regions beyond the end", bad, data, "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=1", "GNU.sparse.size=10", "GNU.sparse.map=5,512"),
		pax("PAX sparse 0.1, regions that overlap", bad, data, "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=2", "GNU.sparse.size=1000", "GNU.sparse.map=0,256,100,256"),
		pax("PAX sparse 0.1, regions backwards", bad, data, "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=2", "GNU.sparse.size=1000", "GNU.sparse.map=500,256,0,256"),
		pax("PAX sparse 0.1, odd numbers", bad, data, "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=1", "GNU.sparse.size=512", "GNU.sparse.map=0,512,3"),
		pax("PAX sparse 0.1, negative region", bad, data, "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=1", "GNU.sparse.size=512", "GNU.sparse.map=-512,512"),
		pax("PAX sparse 0.1, overflowing region", bad, data, "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=1", "GNU.sparse.size=512", "GNU.sparse.map=9223372036854775807,9223372036854775807"),
	}
}

func pad(s string) string { return s + strings.Repeat("\x00", (512-len(s)%512)%512) }

// limits are passed by one.
func limits(l Bounds) []Case {
	list := []Case{
		blocks("bytes said, not sent", "a", "larger than", func() []byte { return Ended(Raw("a", tar.TypeReg, l.Bytes+1, "")) }),
		blocks("file of the largest size", "a", "", func() []byte { return Ended(PAX("size=9223372036854775807"), Raw("a", tar.TypeReg, 0, "")) }),
		blocks("sizes that overflow together", "b", "larger than", func() []byte {
			first := OldSparse(l.Bytes - 10)
			return Ended(first[:len(first)-1024], OldSparse(11)[:512], Raw("b", tar.TypeReg, l.Bytes, ""))
		}),
	}
	if l.Entries > 10_000 {
		return list
	}
	n := int(l.Entries)
	every := func(i int) Entry { return File(fmt.Sprint(i)) }
	says := fmt.Sprintf("more than %d", l.Entries)
	return append(list,
		plain("too many entries", fmt.Sprint(n), says, Times(n+1, every)...),
		plain("too many implied directories", "d/d/d", says, Times(n/50+1, func(i int) Entry {
			return File(strings.Repeat("d/", 1) + "d/d/" + strings.Repeat(fmt.Sprintf("e%d/", i), 100) + "f")
		})...),
		plain("too many hard links", "l2", says, append(Times(n-1, every), Link("l1", "1"), Link("l2", "1"))...),
		plain("too many symlinks", fmt.Sprint(n), says, Times(n+1, func(i int) Entry { return Symlink(fmt.Sprint(i), "/") })...),
	)
}

// truncated is one archive with all kinds of headers, cut at each of its joints.
func truncated() []Case {
	long := strings.Repeat("long/", 30) + "name"
	whole := bytes.Join([][]byte{
		Raw("dir/", tar.TypeDir, 0, ""),
		PAX("path=dir/"+strings.Repeat("p", 120), "mtime=1.5"), Raw("x", tar.TypeReg, 600, strings.Repeat("b", 600)),
		Raw("././@LongLink", 'L', int64(len(long)+1), long+"\x00"), Raw("y", tar.TypeReg, 5, "hello"),
		Raw("dir/link", tar.TypeSymlink, 0, "", func(h []byte) { copy(h[157:], "target") }),
		PAX("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=4096"),
		Raw("GNUSparseFile.0/s", tar.TypeReg, 1024, pad("1\n0\n512\n")+strings.Repeat("x", 512)),
		Raw("last", tar.TypeReg, 1, "x"),
	}, nil)
	var list []Case
	for at := 0; at < len(whole); at += 512 {
		for _, cut := range []int{at + 1, at + 256, at + 512} {
			list = append(list, blocks(fmt.Sprintf("cut after %d bytes", cut), "", "cut off", fixed(whole[:min(cut, len(whole))])))
		}
	}
	return append(list, blocks("cut in the end mark", "last", "cut off", func() []byte { return append(bytes.Clone(whole), make([]byte, 100)...) }))
}

// nested are archives of other formats, and formats that are not theirs.
func nested() []Case {
	good := Tar(File("a"))
	list := []Case{}
	for name, magic := range map[string]string{"xz": "\xfd7zXZ\x00", "bzip2": "BZh9", "7z": "7z\xbc\xaf\x27\x1c", "squashfs": "hsqs"} {
		list = append(list, blocks("a "+name, "", name+" file", func() []byte { return append([]byte(magic), bytes.Repeat([]byte{1}, 2000)...) }))
	}
	for _, f := range []string{"tar.gz", "tar.zst", "zip", "oci"} {
		list = append(list, Case{Name: "a tar as " + f, Format: f, Make: fixed(good)})
	}
	list = append(list,
		Case{Name: "a tar.gz as tar", Format: "tar", Says: "gzip file", Make: fixed(Gzip(Tar(Holding("a", strings.Repeat("x", 2000)))))},
		Case{Name: "a tar.gz as tar.zst", Format: "tar.zst", Says: "not a tar.zst", Make: fixed(Gzip(good))},
		Case{Name: "a tar.gz as zip", Format: "zip", Says: "no end", Make: fixed(Gzip(good))},
		Case{Name: "a tar.gz in a tar.gz", Says: "gzip file", Make: fixed(Gzip(Gzip(good)))},
	)
	return list
}

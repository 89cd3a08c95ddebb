package format

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"

	"holdfast/templates/archive"
)

// Signatures and sizes of PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 to 4.3.16.
const (
	signLocal     = 0x04034b50
	signDirectory = 0x02014b50
	signEnd       = 0x06054b50
	signEnd64     = 0x06064b50
	signLocator64 = 0x07064b50

	directorySize = 46
	endSize       = 22
	end64Size     = 56
	locator64Size = 20
	maxComment    = 1<<16 - 1
)

// Extra fields: of APPNOTE.TXT 4.5.2 and Info-ZIP's extrafld.txt.
const (
	extraZip64 = 0x0001
	extraUnix  = 0x7875
)

// span is where an entry lies in the zip, from its local header to the end of
// its data. The directory's walk knows the first only.
type span struct{ from, to int64 }

// directory walks the zip's directory before anything is made of it: the number
// of entries and the bytes of the directory bound the memory that the library
// will need. A directory that does not lie right before its end record is
// refused, so that everybody finds the same one.
func (z *zipped) directory() error {
	from, to, records, err := z.end()
	if err != nil {
		return err
	}
	switch {
	case from < 0 || from > to || to > z.size:
		return archive.Refuse("the zip's directory is said to be outside of the zip")
	case to-from > maxZipDirectory:
		return archive.Refuse("the zip's directory is larger than %d MiB: send a tar", maxZipDirectory>>20)
	case records > uint64(z.limits.Entries): //nolint:gosec // not negative
		return archive.Refuse("the zip has more than %d entries: send a tar", z.limits.Entries)
	}
	r := bufio.NewReader(io.NewSectionReader(z.file, from, to-from))
	at := from
	for at < to {
		var b [directorySize]byte
		if _, err := io.ReadFull(r, b[:]); err != nil || binary.LittleEndian.Uint32(b[:]) != signDirectory {
			return archive.Refuse("the zip's directory is damaged at entry %d", len(z.entries)+1)
		}
		le := binary.LittleEndian
		name := make([]byte, le.Uint16(b[28:]))
		extra := make([]byte, le.Uint16(b[30:]))
		comment := int(le.Uint16(b[32:]))
		_, err1 := io.ReadFull(r, name)
		_, err2 := io.ReadFull(r, extra)
		_, err3 := r.Discard(comment)
		if err := errors.Join(err1, err2, err3); err != nil {
			return archive.Refuse("the zip's directory is cut off at entry %d (%s)", len(z.entries)+1, archive.Quote(string(name)))
		}
		if disk := le.Uint16(b[34:]); disk != 0 && disk != 1<<16-1 {
			return archive.RefuseEntry(string(name), "it is on another volume of a zip in parts")
		}
		s := span{from: localOffset(b[:], extra)}
		if s.from < 0 || s.from >= from {
			return archive.RefuseEntry(string(name), "the zip has no place for it at byte %d", s.from)
		}
		z.entries = append(z.entries, s)
		if int64(len(z.entries)) > z.limits.Entries {
			return archive.RefuseEntry(string(name), "the zip has more than %d entries: send a tar", z.limits.Entries)
		}
		at += directorySize + int64(len(name)+len(extra)+comment)
	}
	if uint64(len(z.entries)) != records {
		return archive.Refuse("the zip's directory has %d entries, its end says %d", len(z.entries), records)
	}
	z.dataEnd = from
	return nil
}

// end finds the record that ends a zip, and what it says: where the directory
// begins and ends, and how many entries it has. The record must end the file, but for zeroes.
func (z *zipped) end() (from, to int64, records uint64, err error) {
	tail := make([]byte, min(z.size, endSize+maxComment))
	if _, err := z.file.ReadAt(tail, z.size-int64(len(tail))); err != nil {
		return 0, 0, 0, err
	}
	i := bytes.LastIndex(tail, []byte("PK\x05\x06"))
	if i < 0 || i+endSize > len(tail) {
		return 0, 0, 0, archive.Refuse("the zip is cut off: it has no end")
	}
	le, b := binary.LittleEndian, tail[i:]
	whole := endSize + int(le.Uint16(b[20:]))
	if whole > len(b) || len(bytes.Trim(b[whole:], "\x00")) > 0 { // zeroes fill up the last block of a pipe
		return 0, 0, 0, archive.Refuse("the zip has something else behind its end")
	}
	if le.Uint16(b[4:])|le.Uint16(b[6:]) != 0 && le.Uint16(b[4:])&le.Uint16(b[6:]) != 1<<16-1 {
		return 0, 0, 0, archive.Refuse("the zip is one of several parts")
	}
	to = z.size - int64(len(b))
	records = uint64(le.Uint16(b[10:]))
	size, offset := uint64(le.Uint32(b[12:])), uint64(le.Uint32(b[16:]))
	if records == 1<<16-1 || size == 1<<32-1 || offset == 1<<32-1 {
		if to, records, size, offset, err = z.end64(to, records, size, offset); err != nil {
			return 0, 0, 0, err
		}
	}
	if offset > uint64(z.size) || size > uint64(z.size) || int64(offset+size) != to { //nolint:gosec // bounded just before
		return 0, 0, 0, archive.Refuse("the zip's directory does not lie where its end says: bytes were put before it or into it")
	}
	return int64(offset), to, records, nil //nolint:gosec // bounded above
}

// end64 reads the Zip64 records before the end record, where there are any.
func (z *zipped) end64(at int64, records, size, offset uint64) (int64, uint64, uint64, uint64, error) {
	le := binary.LittleEndian
	var locator [locator64Size]byte
	if _, err := z.file.ReadAt(locator[:], at-locator64Size); at < locator64Size || err != nil || le.Uint32(locator[:]) != signLocator64 {
		return at, records, size, offset, nil // not Zip64: the numbers are meant as they are
	}
	var b [end64Size]byte
	where := le.Uint64(locator[8:])
	if where != uint64(at-locator64Size-end64Size) { //nolint:gosec // a place in a file
		return 0, 0, 0, 0, archive.Refuse("the zip's Zip64 end is not before its locator")
	}
	if _, err := z.file.ReadAt(b[:], int64(where)); err != nil || le.Uint32(b[:]) != signEnd64 || le.Uint64(b[4:]) != end64Size-12 { //nolint:gosec // within the file
		return 0, 0, 0, 0, archive.Refuse("the zip's Zip64 end is damaged")
	}
	return int64(where), le.Uint64(b[32:]), le.Uint64(b[40:]), le.Uint64(b[48:]), nil //nolint:gosec // within the file
}

// localOffset tells where a directory entry says that its local header is; -1
// for nowhere.
func localOffset(b, extra []byte) int64 {
	le := binary.LittleEndian
	offset := le.Uint32(b[42:])
	if offset != 1<<32-1 {
		return int64(offset)
	}
	field := extraField(extra, extraZip64)
	for _, size := range []uint32{le.Uint32(b[24:]), le.Uint32(b[20:])} { // those come first, if they are there
		if size == 1<<32-1 {
			if len(field) < 8 {
				return -1
			}
			field = field[8:]
		}
	}
	if len(field) < 8 || le.Uint64(field) > 1<<62 {
		return -1
	}
	return int64(le.Uint64(field)) //nolint:gosec // bounded just before
}

// overlaps refuses entries that share bytes, with which a small zip says that it
// holds the same data many times.
func (z *zipped) overlaps() error {
	order := make([]int, len(z.entries))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return int(z.entries[a].from - z.entries[b].from) })
	end := int64(0)
	for _, i := range order {
		s := z.entries[i]
		if s.from < end {
			return archive.RefuseEntry(z.File[i].Name, "it overlaps with another entry of the zip")
		}
		end = s.to
		if end > z.dataEnd {
			return archive.RefuseEntry(z.File[i].Name, "it overlaps with the zip's directory")
		}
	}
	return nil
}

// extraField finds one in a list of extra fields; nil when it is not there.
func extraField(extra []byte, id uint16) []byte {
	for len(extra) >= 4 {
		n := int(binary.LittleEndian.Uint16(extra[2:]))
		if len(extra) < 4+n {
			return nil
		}
		if binary.LittleEndian.Uint16(extra) == id {
			return extra[4 : 4+n]
		}
		extra = extra[4+n:]
	}
	return nil
}

// owner reads Info-ZIP's "new Unix" field; root where there is none.
func owner(extra []byte) (uid, gid int) {
	b := extraField(extra, extraUnix)
	if len(b) < 2 || b[0] != 1 {
		return 0, 0
	}
	number := func(b []byte) (int, []byte) {
		if len(b) == 0 || int(b[0]) > 4 || len(b) < 1+int(b[0]) {
			return 0, nil
		}
		v := 0
		for i := int(b[0]); i > 0; i-- {
			v = v<<8 | int(b[i])
		}
		return v, b[1+int(b[0]):]
	}
	uid, rest := number(b[1:])
	gid, _ = number(rest)
	return uid, gid
}

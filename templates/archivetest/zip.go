package archivetest

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"hash/crc32"
)

// ZipEntry is one entry as it is to stand in a zip, right or wrong. Zero fields
// of the second part mean what is right.
type ZipEntry struct {
	Name    string
	Data    []byte // as stored
	Method  uint16 // 0 stored, 8 deflated
	Size    uint32 // unpacked
	CRC     uint32 // of what is unpacked
	Attrs   uint32 // external: a Unix mode in the upper half
	Creator uint16 // 3 is Unix, 0 FAT
	Flags   uint16
	Extra   []byte

	LocalName    string
	LocalFlags   *uint16
	LocalMethod  *uint16
	LocalCRC     *uint32
	LocalSize    *uint32
	LocalPacked  *uint32
	LocalExtra   []byte
	Offset       *uint32 // of the local header, in the directory
	Packed       *uint32 // compressed size, in the directory
	NoLocal      bool    // only the directory has it
	Disk         uint16
	DirSignature uint32
}

// Stored is a file that is not compressed, readable by its owner.
func Stored(name string, body string) ZipEntry {
	return ZipEntry{Name: name, Data: []byte(body), Size: uint32(len(body)), CRC: crc32.ChecksumIEEE([]byte(body)), Creator: 3, Attrs: 0o100644 << 16}
}

// Deflated is a compressed file.
func Deflated(name string, body []byte) ZipEntry {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestCompression)
	must(err)
	_, err = w.Write(body)
	must(err)
	must(w.Close())
	return ZipEntry{Name: name, Data: b.Bytes(), Method: 8, Size: uint32(len(body)), CRC: crc32.ChecksumIEEE(body), Creator: 3, Attrs: 0o100644 << 16}
}

// Moded is an entry of a Unix mode, type included.
func Moded(e ZipEntry, mode uint32) ZipEntry {
	e.Attrs = mode << 16
	return e
}

// ZipEnd is the end of a zip; zero fields mean what is right.
type ZipEnd struct {
	Records   *uint16
	Size      *uint32
	Offset    *uint32
	Disk      uint16
	Comment   string
	Signature uint32
	Before    []byte // between directory and end: Zip64 records
}

// Zip packs entries.
func Zip(entries ...ZipEntry) []byte { return ZipWith(ZipEnd{}, entries...) }

// ZipWith packs entries and ends the zip as it is told.
func ZipWith(end ZipEnd, entries ...ZipEntry) []byte {
	var b, dir bytes.Buffer
	for _, e := range entries {
		at := uint32(b.Len())
		if !e.NoLocal {
			name := e.Name
			if e.LocalName != "" {
				name = e.LocalName
			}
			put(&b, uint32(0x04034b50), uint16(20), either(e.LocalFlags, e.Flags), either(e.LocalMethod, e.Method), uint32(0x5a210000),
				either(e.LocalCRC, e.CRC), either(e.LocalPacked, uint32(len(e.Data))), either(e.LocalSize, e.Size), uint16(len(name)), uint16(len(e.LocalExtra)))
			b.WriteString(name)
			b.Write(e.LocalExtra)
			b.Write(e.Data)
		}
		signature := uint32(0x02014b50)
		if e.DirSignature != 0 {
			signature = e.DirSignature
		}
		put(&dir, signature, e.Creator<<8|20, uint16(20), e.Flags, e.Method, uint32(0x5a210000), e.CRC, either(e.Packed, uint32(len(e.Data))), e.Size,
			uint16(len(e.Name)), uint16(len(e.Extra)), uint16(0), e.Disk, uint16(0), e.Attrs, either(e.Offset, at))
		dir.WriteString(e.Name)
		dir.Write(e.Extra)
	}
	at, size := uint32(b.Len()), uint32(dir.Len())
	b.Write(dir.Bytes())
	b.Write(end.Before)
	signature := uint32(0x06054b50)
	if end.Signature != 0 {
		signature = end.Signature
	}
	records := either(end.Records, uint16(len(entries)))
	put(&b, signature, end.Disk, end.Disk, records, records, either(end.Size, size), either(end.Offset, at), uint16(len(end.Comment)))
	b.WriteString(end.Comment)
	return b.Bytes()
}

func put(b *bytes.Buffer, fields ...any) {
	for _, f := range fields {
		must(binary.Write(b, binary.LittleEndian, f))
	}
}

func either[T any](p *T, otherwise T) T {
	if p != nil {
		return *p
	}
	return otherwise
}

func p[T any](v T) *T { return &v }

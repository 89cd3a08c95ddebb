package powercut

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
)

// sector is the unit of the log, in bytes; the rig asks for it when it starts
// the logging node.
const sector = 512

// The flags of an entry; other bits are not known. A mark is a note that only
// dm-log-writes itself makes.
const (
	flagFlush   = 1 << 0
	flagFUA     = 1 << 1
	flagDiscard = 1 << 2
	flagMark    = 1 << 3
	flagMeta    = 1 << 4 // a filesystem's metadata, for all that it matters here
)

const (
	logMagic   = 0x6a736677736872
	logVersion = 1
)

// markAt is where the text of a mark begins in its sector.
const markAt = 32

// entry is one request that the disk has seen.
type entry struct {
	at     int64 // where its own sector is in the log, bytes
	offset int64 // on the disk, bytes
	length int64 // bytes, 0 for a flush
	flags  uint64
	mark   string // its text
}

func (e entry) flush() bool   { return e.flags&flagFlush != 0 }
func (e entry) discard() bool { return e.flags&flagDiscard != 0 }

// end is where the next entry begins in the log.
func (e entry) end() int64 {
	if e.discard() || e.flags&flagMark != 0 {
		return e.at + sector
	}
	return e.at + sector + e.length
}

// readLog reads a whole log of size bytes, made for a disk of disk bytes. A log
// that does not add up to its last byte is an error.
func readLog(log io.ReaderAt, size, disk int64) ([]entry, error) {
	var head [sector]byte
	if size == 0 {
		return nil, nil
	}
	// The superblock is first written by the first flush: its sector may be
	// empty, its count of entries is older than the log.
	if _, err := log.ReadAt(head[:], 0); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	magic, version := binary.LittleEndian.Uint64(head[0:]), binary.LittleEndian.Uint64(head[8:])
	if magic != 0 && (magic != logMagic || version != logVersion || binary.LittleEndian.Uint32(head[24:]) != sector) {
		return nil, fmt.Errorf("not a log: magic %#x, version %d", magic, version)
	}
	var entries []entry
	at := int64(sector)
	for at < size {
		e, err := readEntry(log, at, disk)
		if err == nil && e.flags&flagMark != 0 {
			err = errors.New("a mark, which nobody here makes")
		}
		if err != nil {
			return nil, fmt.Errorf("entry %d at %d: %w", len(entries), at, err)
		}
		entries = append(entries, e)
		at = e.end()
	}
	if at != size {
		return nil, fmt.Errorf("the last entry ends at %d, the log at %d", at, size)
	}
	return entries, nil
}

func readEntry(log io.ReaderAt, at, disk int64) (entry, error) {
	var b [sector]byte
	if _, err := log.ReadAt(b[:], at); err != nil {
		return entry{}, err
	}
	first, count, flags := binary.LittleEndian.Uint64(b[0:]), binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])
	limit := uint64(disk / sector)
	switch {
	case flags&^uint64(flagFlush|flagFUA|flagDiscard|flagMark|flagMeta) != 0:
		return entry{}, fmt.Errorf("unknown flags %#x", flags)
	case flags&flagMark != 0: // its text lies behind the entry, in the same sector
		length := binary.LittleEndian.Uint64(b[24:])
		if length > sector-markAt {
			return entry{}, fmt.Errorf("a mark of %d bytes", length)
		}
		return entry{at: at, flags: flags, mark: strings.TrimRight(string(b[markAt:markAt+length]), "\x00")}, nil
	case first > limit || count > limit-first:
		return entry{}, fmt.Errorf("%d sectors at %d on a disk of %d", count, first, limit)
	case count == 0 && flags == 0:
		return entry{}, errors.New("empty: it was never written")
	}
	return entry{at: at, offset: int64(first) * sector, length: int64(count) * sector, flags: flags}, nil
}

// replay does on d again what the entries did, leaving out those that dropped
// tells of.
func replay(d Disk, log io.ReaderAt, entries []entry, dropped func(i int) bool) error {
	buf := make([]byte, 1<<20)
	for i, e := range entries {
		if e.length == 0 || dropped(i) {
			continue
		}
		if e.discard() {
			if err := d.Zero(e.offset, e.length); err != nil {
				return err
			}
			continue
		}
		for done := int64(0); done < e.length; {
			b := buf[:min(int64(len(buf)), e.length-done)]
			if _, err := log.ReadAt(b, e.at+sector+done); err != nil {
				return err
			}
			if _, err := d.WriteAt(b, e.offset+done); err != nil {
				return err
			}
			done += int64(len(b))
		}
	}
	return nil
}

// before counts the entries that began before a moment.
func before(entries []entry, m Moment) int {
	n := 0
	for n < len(entries) && entries[n].at < int64(m) {
		n++
	}
	return n
}

// settled counts the entries of the first n that a disk must have kept: all up
// to the last flush.
func settled(entries []entry, n int) int {
	for n > 0 && !entries[n-1].flush() {
		n--
	}
	return n
}

// dropper decides which writes since the last flush a disk has lost: none for
// seed 0, else each with an even chance, always the same ones for one seed.
func dropper(seed uint64) func(int) bool {
	if seed == 0 {
		return func(int) bool { return false }
	}
	return func(i int) bool { return rand.New(rand.NewPCG(seed, uint64(i))).Uint64()&1 == 1 }
}

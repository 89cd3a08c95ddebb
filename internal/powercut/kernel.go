package powercut

import (
	"encoding/binary"
	"fmt"
	"io"
)

// KernelLog is what the kernel's own target, dm-log-writes, has recorded. It logs a
// write only when a flush has made it durable: a replay up to a mark is a disk that
// has lost all that was not flushed by then.
type KernelLog struct {
	from    io.ReaderAt
	entries []entry
}

// ReadKernelLog reads the log of a disk of so many bytes. The target must be gone,
// or have nothing to log any more.
func ReadKernelLog(from io.ReaderAt, disk int64) (*KernelLog, error) {
	var head [sector]byte
	if _, err := from.ReadAt(head[:], 0); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	magic, version := binary.LittleEndian.Uint64(head[0:]), binary.LittleEndian.Uint64(head[8:])
	if magic != logMagic || version != logVersion || binary.LittleEndian.Uint32(head[24:]) != sector {
		return nil, fmt.Errorf("not a log: magic %#x, version %d", magic, version)
	}
	l := &KernelLog{from: from}
	at := int64(sector)
	for n := range binary.LittleEndian.Uint64(head[16:]) {
		e, err := readEntry(from, at, disk)
		if err != nil {
			return nil, fmt.Errorf("entry %d at %d: %w", n, at, err)
		}
		l.entries = append(l.entries, e)
		at = e.end()
	}
	return l, nil
}

// Len is the number of entries.
func (l *KernelLog) Len() int { return len(l.entries) }

// Mark finds the mark with a text: the number of entries up to it. -1 for none.
func (l *KernelLog) Mark(text string) int {
	for n, e := range l.entries {
		if e.flags&flagMark != 0 && e.mark == text {
			return n
		}
	}
	return -1
}

// Flushes gives the moments between two of them, as numbers of entries, at which a
// flush had ended.
func (l *KernelLog) Flushes(from, to int) (at []int) {
	for n := from; n < to; n++ {
		if l.entries[n].flush() || l.entries[n].flags&flagFUA != 0 {
			at = append(at, n+1)
		}
	}
	return at
}

// Disk is what a log can be replayed onto.
type Disk interface {
	io.WriterAt
	// Zero makes a range read as zero.
	Zero(offset, length int64) error
}

// Replay does the first n entries again, on a disk of zeroes.
func (l *KernelLog) Replay(on Disk, n int) error {
	return replay(on, l.from, l.entries[:n], dropper(0))
}

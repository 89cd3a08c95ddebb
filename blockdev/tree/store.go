package tree

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"holdfast/blockdev/extent"
)

// Content is what a Store keeps of one file. It is complete when the Store was
// flushed.
type Content struct {
	Size    int64
	Runs    []Run
	Digests []Digest
}

const (
	batchBytes = 4 * Chunk // what is digested and written at once
	batches    = 3         // in flight: one is filled, one is worked on
)

// Store writes the contents of files into one file, one behind the other, each
// at a multiple of Block and without blocks of zeroes; digests and writes are
// done in the background. It needs batches*batchBytes of memory. Its caller is one
// goroutine. Nothing is flushed to disk: a store lives as long as its process.
type Store struct {
	f       *os.File
	at      atomic.Int64 // where the next block goes
	taken   int64        // blocks that were given to it, zeroes too
	filling *batch
	full    chan *batch
	empty   chan *batch
	ended   chan struct{}
	once    sync.Once

	mu  sync.Mutex
	err error
}

// batch is a buffer of parts, each beginning at a multiple of Block.
type batch struct {
	buf   []byte
	used  int
	parts []part
}

// part is one chunk of a file. One without bytes stands for chunks of zeroes.
type part struct {
	of       *Content
	offset   int64 // in the file
	from, to int   // in the buffer
	zeroes   int64 // chunks
}

// NewStore writes to f, an empty file that the caller closes after Close.
func NewStore(f *os.File) *Store {
	s := &Store{f: f, full: make(chan *batch, batches), empty: make(chan *batch, batches), ended: make(chan struct{})}
	for range batches - 1 {
		s.empty <- nil // buffers are made when they are needed
	}
	s.filling = &batch{}
	go s.work()
	return s
}

// Close ends the background work; what was added may be incomplete without a
// Flush before. Again is nothing.
func (s *Store) Close() {
	s.once.Do(func() { close(s.full) })
	<-s.ended
}

// Add reads a file to its end. r's errors are returned as they are.
func (s *Store) Add(ctx context.Context, r io.Reader) (*Content, error) {
	c := &Content{}
	for {
		if err := errors.Join(ctx.Err(), s.failure()); err != nil {
			return nil, err
		}
		room := s.room()
		n, err := io.ReadFull(r, room)
		if n > 0 {
			s.take(part{of: c, offset: c.Size}, n)
			c.Size += int64(n)
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF) && n < len(room) && atEnd(r):
			return c, nil
		case err != nil:
			return nil, err
		}
	}
}

// atEnd tells a reader's regular end from an io.ErrUnexpectedEOF of its own.
func atEnd(r io.Reader) bool {
	var b [1]byte
	n, err := r.Read(b[:])
	return n == 0 && errors.Is(err, io.EOF)
}

// AddFile reads an open file that nobody changes; its holes are not read.
// io.ErrUnexpectedEOF when it is shorter than size.
func (s *Store) AddFile(ctx context.Context, f *os.File, size int64) (*Content, error) {
	ranges, err := extent.Map(ctx, f)
	if err != nil {
		return nil, err
	}
	c := &Content{Size: size}
	for at := int64(0); at < size; {
		if err := errors.Join(ctx.Err(), s.failure()); err != nil {
			return nil, err
		}
		for len(ranges) > 0 && ranges[0].End() <= at {
			ranges = ranges[1:]
		}
		next := size
		if len(ranges) > 0 {
			next = max(at, ranges[0].Offset)
		}
		if skip := zeroChunks(next-at, next >= size); skip > 0 {
			s.takeZeroes(part{of: c, offset: at, zeroes: skip})
			at += skip * Chunk
			continue
		}
		n := min(Chunk, size-at)
		buf := s.room()[:n]
		if err := readRanges(f, buf, at, ranges); err != nil {
			return nil, err
		}
		s.take(part{of: c, offset: at}, int(n))
		at += n
	}
	return c, nil
}

// zeroChunks is how many chunks a hole covers; the last one of a file may be short.
func zeroChunks(hole int64, last bool) int64 {
	if last {
		hole += Chunk - 1
	}
	return hole / Chunk
}

// readRanges reads what of a chunk at an offset is data; the rest is zeroed.
func readRanges(f *os.File, buf []byte, at int64, ranges []extent.Range) error {
	clear(buf)
	end := at + int64(len(buf))
	for _, r := range ranges {
		if r.Offset >= end {
			break
		}
		from, to := max(r.Offset, at), min(r.End(), end)
		if _, err := f.ReadAt(buf[from-at:to-at], from); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// room is space for a whole chunk in the batch that is being filled.
func (s *Store) room() []byte {
	if s.filling.buf == nil {
		s.filling.buf = make([]byte, batchBytes)
	}
	if len(s.filling.buf)-s.filling.used < Chunk {
		s.hand()
		return s.room()
	}
	return s.filling.buf[s.filling.used : s.filling.used+Chunk]
}

// take takes n bytes that were put into the room.
func (s *Store) take(p part, n int) {
	b := s.filling
	p.from, p.to = b.used, b.used+n
	b.used = min(roundUp(p.to), len(b.buf))
	s.taken += int64(b.used - p.from)
	clear(b.buf[p.to:b.used]) // a run's last block is filled up with zeroes
	b.parts = append(b.parts, p)
}

func (s *Store) takeZeroes(p part) {
	s.filling.parts = append(s.filling.parts, p)
	if len(s.filling.parts) >= batchBytes/Block {
		s.hand()
	}
}

// hand gives the batch to the background and takes an empty one.
func (s *Store) hand() {
	s.full <- s.filling
	s.filling = <-s.empty
	if s.filling == nil {
		s.filling = &batch{}
	}
	s.filling.used, s.filling.parts = 0, s.filling.parts[:0]
}

// Flush waits until all that was added is digested and written, and tells how
// long the store is, in bytes.
func (s *Store) Flush() (int64, error) {
	s.hand()
	var all []*batch
	for range batches - 1 {
		all = append(all, <-s.empty) // the background has none any more
	}
	for _, b := range all {
		s.empty <- b
	}
	return s.at.Load(), s.failure()
}

// Size is how long the store is at most when what was added by now is written,
// in bytes.
func (s *Store) Size() int64 { return min(s.taken, s.at.Load()+batches*batchBytes) }

func (s *Store) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *Store) work() {
	defer close(s.ended)
	for b := range s.full {
		if s.failure() == nil {
			if err := s.write(b); err != nil {
				s.mu.Lock()
				s.err = err
				s.mu.Unlock()
			}
		}
		s.empty <- b
	}
}

// write digests the parts of a batch and writes their blocks that are not zero.
func (s *Store) write(b *batch) error {
	start, end := 0, 0 // of the buffer, still to be written at s.at
	put := func() error {
		if start == end {
			return nil
		}
		_, err := s.f.WriteAt(b.buf[start:end], s.at.Load())
		s.at.Add(int64(end - start))
		return err
	}
	for _, p := range b.parts {
		for range p.zeroes {
			p.of.Digests = append(p.of.Digests, Digest{})
		}
		if p.zeroes > 0 {
			continue
		}
		data := b.buf[p.from:p.to]
		p.of.Digests = append(p.of.Digests, DigestOf(data))
		for run := range dataRuns(data) {
			from, to := p.from+run.from, p.from+run.to
			if from != end {
				if err := put(); err != nil {
					return err
				}
				start = from
			}
			p.of.Add(Run{Offset: p.offset + int64(run.from), Length: int64(run.to - run.from), At: s.at.Load() + int64(from-start)})
			end = roundUp(to)
		}
	}
	return put()
}

// Add appends a run, to the one before if they touch in file and store.
func (c *Content) Add(r Run) {
	if n := len(c.Runs); n > 0 {
		last := &c.Runs[n-1]
		if last.Store == r.Store && last.Offset+last.Length == r.Offset && last.At+last.Length == r.At {
			last.Length += r.Length
			return
		}
	}
	c.Runs = append(c.Runs, r)
}

// DigestOf is the digest of a chunk's bytes.
func DigestOf(chunk []byte) Digest {
	if isZero(chunk) {
		return Digest{}
	}
	return sha256.Sum256(chunk)
}

var zeroChunk [Chunk]byte

func isZero(b []byte) bool { return len(b) == 0 || b[0] == 0 && bytes.Equal(b, zeroChunk[:len(b)]) }

type span struct{ from, to int }

// dataRuns gives the ranges of whole blocks of b that are not zero throughout.
func dataRuns(b []byte) func(yield func(span) bool) {
	return func(yield func(span) bool) {
		from := -1
		for i := 0; i < len(b); i += Block {
			switch zero := isZero(b[i:min(i+Block, len(b))]); {
			case zero && from >= 0:
				if !yield(span{from, i}) {
					return
				}
				from = -1
			case !zero && from < 0:
				from = i
			}
		}
		if from >= 0 {
			yield(span{from, len(b)})
		}
	}
}

func roundUp(n int) int { return (n + Block - 1) / Block * Block }

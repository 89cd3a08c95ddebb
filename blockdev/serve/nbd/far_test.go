package nbd

import (
	"context"
	"io"
	"runtime"
	"testing"

	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
)

// stored is a base far away that answers when it is let.
type stored struct {
	content []byte
	let     chan struct{}
}

func (s *stored) Size() int64 { return int64(len(s.content)) }

func (s *stored) Next(off int64) (from, to int64, err error) {
	if off >= s.Size() {
		return 0, 0, io.EOF
	}
	return off, s.Size(), nil
}

func (s *stored) ReadAt(p []byte, off int64) (int, error) { return copy(p, s.content[off:]), nil }

func (s *stored) fetch(ctx context.Context, p []byte, off int64) error {
	select {
	case <-s.let:
	case <-ctx.Done():
		return ctx.Err()
	}
	_, err := s.ReadAt(p, off)
	return err
}

// TestSilentStore: for a client that is served by goroutines, as all are that come by
// TLS, what needs no store goes on beside 200 reads and writes of parts of blocks that do.
func TestSilentStore(t *testing.T) {
	byGoroutines = true
	defer func() { byGoroutines = false }()
	const size, far = 4 * mib, 200
	s := &stored{pattern(size, 9), make(chan struct{})}
	chunks, err := overlay.Digest(s, overlay.DefaultChunk)
	must(t, err)
	base, err := overlay.NewRemote(chunks, s.fetch, overlay.RemoteOptions{})
	must(t, err)
	t.Cleanup(base.Close)
	v, err := overlay.Open([]overlay.Files{layerFiles(t, size)}, base)
	must(t, err)
	counts := &meter.Meter{}
	e, err := NewExport("", v, ExportOptions{Size: size, Meter: counts})
	must(t, err)
	_, socket := serving(t, Options{}, e)
	c := dial(t, socket).enter("")
	for n := range uint64(far) {
		if n%2 == 0 {
			c.write(requestBytes(cmdRead, 0, 1000+n, n*4096, 4096))
		} else {
			c.write(append(requestBytes(cmdWrite, 0, 1000+n, n*4096+512, 512), pattern(512, n)...))
		}
	}
	for counts.Snapshot().Waits[meter.Hydration].Now < far {
		runtime.Gosched()
	}
	c.ok(cmdWrite, 0, 2*mib, 8192, pattern(8192, 1))
	c.ok(cmdFlush, 0, 0, 0, nil)
	c.reads(2*mib, pattern(8192, 1))
	c.ok(cmdTrim, 0, 2*mib, 4096, nil)
	c.ok(cmdWriteZeroes, 0, 3*mib, 4096, nil)
	close(s.let)
	for range far {
		head := c.read(simpleSize)
		n := uint64(head[14])<<8 + uint64(head[15]) - 1000
		if head[4]|head[5]|head[6]|head[7] != 0 {
			t.Fatalf("request %d fails: %x", n, head)
		}
		if n%2 == 0 && string(c.read(4096)) != string(s.content[n*4096:(n+1)*4096]) {
			t.Fatalf("block %d reads as something else than the base", n)
		}
	}
	for n := uint64(1); n < far; n += 2 {
		copy(s.content[n*4096+512:], pattern(512, n))
		c.reads(n*4096, s.content[n*4096:(n+1)*4096])
	}
}

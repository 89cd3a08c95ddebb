package nbd

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/internal/sys"
)

// canary is what lies before and behind a fuzzed export in memory.
const canary = 0xca

// memory is a device for fuzzing: small, without blocks, and with a hole in every
// second page.
type memory struct{ bytes []byte }

func (m *memory) ReadAt(b []byte, off int64) (int, error)  { return copy(b, m.bytes[off:]), nil }
func (m *memory) WriteAt(b []byte, off int64) (int, error) { return copy(m.bytes[off:], b), nil }
func (m *memory) Sync() error                              { return nil }
func (m *memory) Discard(int64, int64) error               { return nil }
func (m *memory) BlockSize() int                           { return 1 }
func (m *memory) Zero(off, length int64, _ bool) error {
	clear(m.bytes[off : off+length])
	return nil
}
func (m *memory) Extent(off, limit int64) (int64, bool, error) {
	return min(limit, 4096-off%4096), off/4096%2 == 0, nil
}

// onFile is a memory that is a file, for the loop.
type onFile struct {
	*memory
	file *os.File
}

func (d onFile) File() *os.File { return d.file }

// fuzzedFile is fuzzed with the loop; what it writes past the export is in the file.
func fuzzedFile(t *testing.T, sent []byte) []byte {
	t.Helper()
	const size = 64 << 10
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	must(t, err)
	defer f.Close()
	behind := bytes.Repeat([]byte{canary}, 4096)
	_, err = f.WriteAt(behind, size)
	must(t, err)
	answers := fuzzedOn(t, onFile{&memory{bytes: make([]byte, size)}, f}, sent)
	rest, err := os.ReadFile(f.Name())
	must(t, err)
	if !bytes.Equal(rest[size:], behind) {
		t.Fatal("a byte behind the export was written")
	}
	return answers
}

// fuzzed serves a client that sends some bytes and hangs up, and gives all that it
// was answered. Nothing outside of the export may be written.
func fuzzed(t *testing.T, sent []byte) []byte {
	t.Helper()
	const size = 64 << 10
	all := bytes.Repeat([]byte{canary}, 3*size)
	clear(all[size : 2*size])
	answers := fuzzedOn(t, &memory{bytes: all[size : 2*size : 2*size]}, sent)
	for i, b := range all {
		if (i < size || i >= 2*size) && b != canary {
			t.Fatalf("a byte outside of the export was written, at %d", i-size)
		}
	}
	return answers
}

func fuzzedOn(t *testing.T, d Device, sent []byte) []byte {
	t.Helper()
	e, err := NewExport("x", d, ExportOptions{Size: 64 << 10, Description: "fuzzed"})
	must(t, err)
	s := NewServer(Options{})
	must(t, s.Add(e))
	ours, theirs := connected(t)
	must(t, ours.SetDeadline(time.Now().Add(patience)))
	served := make(chan struct{})
	go func() {
		_ = s.ServeConn(theirs) // most end with an error
		close(served)
	}()
	go func() {
		ours.Write(sent) // the server may have hung up
		ours.CloseWrite()
	}()
	answers, _ := io.ReadAll(ours)
	<-served
	must(t, s.Close())
	return answers
}

func connected(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	a, b, err := sys.SocketPair()
	must(t, err)
	defer a.Close()
	defer b.Close()
	one, err := net.FileConn(a)
	must(t, err)
	other, err := net.FileConn(b)
	must(t, err)
	t.Cleanup(func() { one.Close() })
	return one.(*net.UnixConn), other.(*net.UnixConn)
}

func greetingBytes(options ...[]byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, 3), bytes.Join(options, nil)...)
}

func FuzzHandshake(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add(greetingBytes(optionBytes(optList, nil), optionBytes(optAbort, nil)))
	f.Add(greetingBytes(optionBytes(optStartTLS, nil), optionBytes(optExportName, []byte("x"))))
	f.Add(greetingBytes(optionBytes(optInfo, append(stringBytes("x"), 0, 2, 0, 1, 0, 2)), optionBytes(optGo, goBytes("x")), requestBytes(cmdRead, 0, 1, 0, 512)))
	f.Add(greetingBytes(optionBytes(optStructuredReply, nil), optionBytes(optListMetaContext, metaBytes("x", "base:")),
		optionBytes(optSetMetaContext, metaBytes("x", contextAllocation, "y:z")), optionBytes(optGo, goBytes("")), requestBytes(cmdBlockStatus, 0, 1, 0, 9000)))
	f.Fuzz(func(t *testing.T, sent []byte) {
		if answers := fuzzed(t, sent); len(answers) < 18 {
			t.Errorf("not even greeted: %x", answers)
		}
	})
}

func FuzzTransmission(f *testing.F) {
	preamble := greetingBytes(optionBytes(optStructuredReply, nil), optionBytes(optSetMetaContext, metaBytes("x", contextAllocation)), optionBytes(optGo, goBytes("x")))
	all := bytes.Join([][]byte{
		requestBytes(cmdWrite, flagFUA, 1, 5, 3), {1, 2, 3}, requestBytes(cmdRead, flagDF, 2, 0, 100), requestBytes(cmdFlush, 0, 3, 0, 0),
		requestBytes(cmdTrim, 0, 4, 0, 4096), requestBytes(cmdWriteZeroes, flagNoHole, 5, 100, 1<<15), requestBytes(cmdBlockStatus, 0, 6, 1, 60000), requestBytes(cmdDisconnect, 0, 7, 0, 0),
	}, nil)
	f.Add(all)
	f.Add(all[:40])
	f.Add(requestBytes(cmdRead, 0, 1, 1<<64-1, 2))
	f.Add(requestBytes(cmdRead, 0, 1, 64<<10-1, 2))
	f.Add(requestBytes(cmdWrite, 0, 1, 64<<10-1, 1<<32-1))
	f.Add(requestBytes(99, 0xffff, 1, 0, 0))
	f.Add([]byte("no request at all, but long enough to be one"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		sent = append(bytes.Clone(preamble), sent...)
		for name, serve := range map[string]func(*testing.T, []byte) []byte{"goroutines": fuzzed, "ring": fuzzedFile} {
			answers := serve(t, sent)
			replies, ok := readReplies(answers)
			if !ok {
				t.Fatalf("%s: the answers are no whole replies: %x", name, answers[:min(len(answers), 512)])
			}
			if most := (len(sent) - len(preamble)) / requestSize; replies > most {
				t.Errorf("%s: %d replies to at most %d requests", name, replies, most)
			}
		}
	})
}

// readReplies goes through what the server said after the greeting: replies to
// options, then to requests, structured ones where there is data.
func readReplies(b []byte) (replies int, ok bool) {
	if len(b) < 18 {
		return 0, false
	}
	for b = b[18:]; len(b) >= 20 && binary.BigEndian.Uint64(b) == magicReply; {
		n := 20 + int(binary.BigEndian.Uint32(b[16:]))
		if n > len(b) {
			return 0, false
		}
		b = b[n:]
	}
	for len(b) > 0 {
		n := simpleSize
		switch {
		case len(b) < simpleSize:
			return 0, false
		case binary.BigEndian.Uint32(b) == magicSimple:
		case binary.BigEndian.Uint32(b) != magicStructured || len(b) < chunkSize:
			return 0, false
		default:
			n = chunkSize + int(binary.BigEndian.Uint32(b[16:]))
			if n > len(b) {
				return 0, false
			}
		}
		b = b[n:]
		replies++
	}
	return replies, true
}

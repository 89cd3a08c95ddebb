package archive

import (
	"bytes"
	"io"
)

const blockSize = 512

// tail remembers of what passes through it how much it was, its first bytes and
// its last ones: enough to tell a complete archive from one that was cut off.
type tail struct {
	r     io.Reader
	total int64
	head  [8]byte
	zeros int64 // zero bytes since the last other one
	err   error // what the reader ended with
}

func (t *tail) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if n > 0 {
		if t.total < int64(len(t.head)) {
			copy(t.head[t.total:], p[:n])
		}
		t.total += int64(n)
		t.trailing(p[:n])
	}
	if err != nil {
		t.err = err
	}
	return n, err
}

// trailing counts the zero bytes at the end; it looks at the last block only, so
// it costs nothing for data.
func (t *tail) trailing(p []byte) {
	last := p[max(0, len(p)-blockSize):]
	trimmed := len(bytes.TrimRight(last, "\x00"))
	if trimmed > 0 || len(last) < len(p) {
		t.zeros = 0
	}
	t.zeros += int64(len(last) - trimmed)
}

// zero reports whether the last block was zero throughout.
func (t *tail) zero() bool { return t.zeros >= blockSize }

// format names what the first bytes look like; "" for anything else.
func (t *tail) format() string {
	for _, f := range []struct{ magic, name string }{
		{"\x1f\x8b", "gzip"},
		{"\x28\xb5\x2f\xfd", "zstd"},
		{"PK\x03\x04", "zip"},
		{"\xfd7zXZ\x00", "xz"},
		{"BZh", "bzip2"},
		{"7z\xbc\xaf\x27\x1c", "7z"},
		{"hsqs", "squashfs"},
	} {
		if bytes.HasPrefix(t.head[:], []byte(f.magic)) {
			return f.name
		}
	}
	return ""
}

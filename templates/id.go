package templates

import (
	"crypto/rand"
	"encoding/base32"
	"strings"
	"time"

	"holdfast/blockdev"
)

// idText sorts as the bytes do (RFC 4648, 7).
var idText = base32.NewEncoding("0123456789abcdefghijklmnopqrstuv").WithPadding(base32.NoPadding)

// newID makes an id whose text sorts by time: 6 bytes of milliseconds, 10 random.
func newID(prefix string, now time.Time) blockdev.ID {
	var b [16]byte
	ms := uint64(now.UnixMilli()) //nolint:gosec // after 1970
	for i := range 6 {
		b[i] = byte(ms >> (40 - 8*i)) //nolint:gosec // one byte of it
	}
	_, _ = rand.Read(b[6:]) // never fails (crypto/rand)
	return blockdev.ID(prefix + "-" + idText.EncodeToString(b[:]))
}

// madeAt is when an id was made, to the millisecond.
func madeAt(id blockdev.ID) time.Time {
	_, text, _ := strings.Cut(string(id), "-")
	b, err := idText.DecodeString(text)
	if err != nil || len(b) < 6 {
		return time.Time{}
	}
	var ms int64
	for _, c := range b[:6] {
		ms = ms<<8 | int64(c)
	}
	return time.UnixMilli(ms)
}

// isRevision tells whether an id is a revision's.
func isRevision(id blockdev.ID) bool {
	return strings.HasPrefix(string(id), blockdev.PrefixRevision+"-")
}

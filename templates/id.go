package templates

import (
	"crypto/rand"
	"encoding/base32"
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

package engine

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"time"

	"holdfast/blockdev"
)

// idEncoding sorts as the bytes do: base32 with the extended hex alphabet (RFC 4648, 7).
var idEncoding = base32.NewEncoding("0123456789abcdefghijklmnopqrstuv").WithPadding(base32.NoPadding)

// newID makes an id whose text sorts by time: 6 bytes of milliseconds, 10 random.
func newID(prefix string, now time.Time) blockdev.ID {
	var b [16]byte
	ms := uint64(now.UnixMilli())
	for i := range 6 {
		b[i] = byte(ms >> (40 - 8*i))
	}
	rand.Read(b[6:]) // never fails (crypto/rand)
	return blockdev.ID(prefix + "-" + idEncoding.EncodeToString(b[:]))
}

// newUUID makes a random (version 4) UUID.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// newName names a volume whose creator gave no name.
func newName() string {
	var b [4]byte
	rand.Read(b[:])
	return "volume-" + hex.EncodeToString(b[:])
}

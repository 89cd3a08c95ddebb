package blockdevtest

import (
	"crypto/rand"
	"encoding/base32"

	"holdfast/blockdev"
)

// NewID makes a random, valid ID of a kind ("vol", "rev", "src").
func NewID(prefix string) blockdev.ID {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	text := base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString(b)
	lower := []byte(text)
	for i, c := range lower {
		if c >= 'A' && c <= 'Z' {
			lower[i] = c + 'a' - 'A'
		}
	}
	return blockdev.ID(prefix + "-" + string(lower))
}

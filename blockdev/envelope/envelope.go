package envelope

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"holdfast/blockdev"
)

const (
	format  = "holdfast-description"
	version = 1
	// MaxPayload is the longest description, in bytes.
	MaxPayload = 1 << 20
	// MaxSealed bounds what is to be read of a file that claims to be an envelope.
	MaxSealed = MaxPayload + 1024
)

// header is the first line of a description file; the payload and a line
// feed follow. It names its image, so that a file in the wrong place is noticed.
type header struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	Of      string `json:"of"`
	Length  int    `json:"length"` // of the payload, bytes
	SHA256  string `json:"sha256"` // of the payload, hex
}

// Seal puts a payload into an envelope for the image (or thing) named of.
func Seal(of string, payload []byte) ([]byte, error) {
	if len(payload) > MaxPayload {
		return nil, fmt.Errorf("description of %d bytes, at most %d: %w", len(payload), MaxPayload, blockdev.ErrInvalid)
	}
	sum := sha256.Sum256(payload)
	line, err := json.Marshal(header{format, version, of, len(payload), hex.EncodeToString(sum[:])})
	if err != nil {
		return nil, err
	}
	sealed := make([]byte, 0, len(line)+len(payload)+2)
	sealed = append(append(sealed, line...), '\n')
	return append(append(sealed, payload...), '\n'), nil
}

// Unseal verifies an envelope and gives its payload. Whatever is not exactly
// what Seal makes is blockdev.ErrCorrupt, with the reason.
func Unseal(of string, sealed []byte) ([]byte, error) {
	damaged := func(format string, args ...any) ([]byte, error) {
		return nil, fmt.Errorf("%w: %s", blockdev.ErrCorrupt, fmt.Sprintf(format, args...))
	}
	line, rest, ok := bytes.Cut(sealed, []byte("\n"))
	if !ok {
		return damaged("description has no header line")
	}
	var h header
	if err := json.Unmarshal(line, &h); err != nil {
		return damaged("description header: %v", err)
	}
	switch {
	case h.Format != format:
		return damaged("description format is %.40q", h.Format)
	case h.Version != version:
		return damaged("description format version is %d, this program knows %d", h.Version, version)
	case h.Of != of:
		return damaged("description is of %.60q", h.Of)
	case h.Length < 0 || len(rest) != h.Length+1:
		return damaged("description has %d bytes, its header says %d", len(rest)-1, h.Length)
	}
	payload := rest[:h.Length:h.Length]
	again, err := Seal(of, payload)
	if err != nil {
		return damaged("%v", err)
	}
	if !bytes.Equal(again, sealed) {
		return damaged("description does not match its checksum")
	}
	return payload, nil
}

package remote

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"

	"holdfast/blockdev/filesystem"
)

// Head says what an image is, before it is there.
type Head struct {
	Template     string          `json:"template"` // as it was called where it was published
	Version      string          `json:"version"`
	Filesystem   filesystem.Type `json:"filesystem"`
	Size         int64           `json:"size"` // of the image, bytes
	ContentBytes int64           `json:"contentBytes"`
	Entries      int64           `json:"entries"` // inodes
	DataBytes    int64           `json:"dataBytes"`
}

// Manifest describes a published revision. Image and Chunks are names of files in the
// manifest's own directory.
type Manifest struct {
	Format int `json:"format"` // manifestFormat
	Head
	Image        string `json:"image"`
	Chunks       string `json:"chunks"`
	ChunksDigest string `json:"chunksDigest"` // "sha256:..." of the file of chunks
}

const (
	manifestFormat = 1
	// MaxManifest bounds a manifest, in bytes.
	MaxManifest = 16 << 10
	// MaxChunks bounds a file of chunks, in bytes: 128 GiB in chunks of 64 KiB, and more
	// in larger ones.
	MaxChunks = 64<<20 + 64
	// MaxSize bounds an image, in bytes: chunks of 4 MiB are the largest.
	MaxSize = (MaxChunks - 64) / sha256.Size * (4 << 20)
)

// ErrManifest means that a manifest is none, or not of this version.
var ErrManifest = errors.New("manifest of a published template version is not valid")

// partForm is what a file beside the manifest may be called.
var partForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$`)

func (h Head) check() error {
	switch {
	case !h.Filesystem.Valid() || h.Filesystem == filesystem.None:
		return fmt.Errorf("filesystem %.20q", h.Filesystem)
	case h.Size < filesystem.MiB || h.Size > MaxSize || h.Size%filesystem.MiB != 0:
		return fmt.Errorf("an image of %d bytes: whole MiB up to %d", h.Size, int64(MaxSize))
	case h.ContentBytes < 0 || h.Entries < 0 || h.DataBytes < 0:
		return errors.New("a negative number")
	}
	return nil
}

// Encode gives the manifest's bytes, always the same ones.
func (m Manifest) Encode() []byte {
	m.Format = manifestFormat
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		panic(err) // no field of it can fail
	}
	return append(b, '\n')
}

// DecodeManifest reads what Encode gave. ErrManifest for anything else.
func DecodeManifest(b []byte) (Manifest, error) {
	var m Manifest
	in := json.NewDecoder(bytes.NewReader(b))
	if err := in.Decode(&m); err != nil {
		return m, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	if _, err := in.Token(); !errors.Is(err, io.EOF) {
		return m, fmt.Errorf("%w: something comes behind it", ErrManifest)
	}
	if m.Format != manifestFormat {
		return m, fmt.Errorf("%w: it has format %d, this server knows %d", ErrManifest, m.Format, manifestFormat)
	}
	if err := m.check(); err != nil {
		return m, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	if !partForm.MatchString(m.Image) || !partForm.MatchString(m.Chunks) {
		return m, fmt.Errorf("%w: its files are called %.60q and %.60q", ErrManifest, m.Image, m.Chunks)
	}
	if _, err := ParseDigest(m.ChunksDigest); err != nil {
		return m, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	return m, nil
}

const digestPrefix = "sha256:"

// ParseDigest reads "sha256:" and 64 hexadecimal digits; the prefix may be left out.
func ParseDigest(text string) (d [sha256.Size]byte, err error) {
	if len(text) > len(digestPrefix) && text[:len(digestPrefix)] == digestPrefix {
		text = text[len(digestPrefix):]
	}
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(d) {
		return d, fmt.Errorf("%.80q is no digest: sha256: and 64 hexadecimal digits", text)
	}
	return [sha256.Size]byte(b), nil
}

// FormatDigest is the text of a digest.
func FormatDigest(d [sha256.Size]byte) string { return digestPrefix + hex.EncodeToString(d[:]) }

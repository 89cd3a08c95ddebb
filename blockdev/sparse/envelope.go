package sparse

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"holdfast/blockdev"
)

const (
	envelopeFormat  = "holdfast-description"
	envelopeVersion = 1
	// MaxDescription is the longest description, in bytes.
	MaxDescription = 1 << 20
	// maxEnvelope bounds what is read of a file that claims to be an envelope.
	maxEnvelope = MaxDescription + 1024
)

// envelopeHeader is the first line of a description file; the payload and a line
// feed follow. It names its image, so that a file in the wrong place is noticed.
type envelopeHeader struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	Of      string `json:"of"`
	Length  int    `json:"length"` // of the payload, bytes
	SHA256  string `json:"sha256"` // of the payload, hex
}

// seal puts a payload into an envelope for the image (or thing) named of.
func seal(of string, payload []byte) ([]byte, error) {
	if len(payload) > MaxDescription {
		return nil, fmt.Errorf("description of %d bytes, at most %d: %w", len(payload), MaxDescription, blockdev.ErrInvalid)
	}
	sum := sha256.Sum256(payload)
	header, err := json.Marshal(envelopeHeader{envelopeFormat, envelopeVersion, of, len(payload), hex.EncodeToString(sum[:])})
	if err != nil {
		return nil, err
	}
	sealed := make([]byte, 0, len(header)+len(payload)+2)
	sealed = append(append(sealed, header...), '\n')
	return append(append(sealed, payload...), '\n'), nil
}

// unseal verifies an envelope and gives its payload. Whatever is not exactly
// what seal makes is blockdev.ErrCorrupt, with the reason.
func unseal(of string, sealed []byte) ([]byte, error) {
	damaged := func(format string, args ...any) ([]byte, error) {
		return nil, fmt.Errorf("%w: %s", blockdev.ErrCorrupt, fmt.Sprintf(format, args...))
	}
	line, rest, ok := bytes.Cut(sealed, []byte("\n"))
	if !ok {
		return damaged("description has no header line")
	}
	var h envelopeHeader
	if err := json.Unmarshal(line, &h); err != nil {
		return damaged("description header: %v", err)
	}
	switch {
	case h.Format != envelopeFormat:
		return damaged("description format is %.40q", h.Format)
	case h.Version != envelopeVersion:
		return damaged("description format version is %d, this program knows %d", h.Version, envelopeVersion)
	case h.Of != of:
		return damaged("description is of %.60q", h.Of)
	case h.Length < 0 || len(rest) != h.Length+1:
		return damaged("description has %d bytes, its header says %d", len(rest)-1, h.Length)
	}
	payload := rest[:h.Length:h.Length]
	again, err := seal(of, payload)
	if err != nil {
		return damaged("%v", err)
	}
	if !bytes.Equal(again, sealed) {
		return damaged("description does not match its checksum")
	}
	return payload, nil
}

// readEnvelope reads and verifies the envelope in a file. fs.ErrNotExist when it
// is not there.
func readEnvelope(path, of string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sealed, err := io.ReadAll(io.LimitReader(f, maxEnvelope))
	if err != nil {
		return nil, err
	}
	return unseal(of, sealed)
}

// replaceEnvelope durably and atomically makes dir/name an envelope.
func (p *Pool) replaceEnvelope(dir, name, of string, payload []byte) error {
	sealed, err := seal(of, payload)
	if err != nil {
		return err
	}
	path, fresh := dir+"/"+name, dir+"/"+name+".new"
	if err := writeFile(fresh, sealed); err != nil {
		return err
	}
	if err := p.at("describe.rename"); err != nil {
		return err
	}
	if err := os.Rename(fresh, path); err != nil {
		return noSpace(err)
	}
	if err := p.at("describe.flush"); err != nil {
		return err
	}
	return syncDir(dir)
}

// writeFile makes a file with this content, in the place of an older one, and
// flushes it.
func writeFile(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return noSpace(err)
	}
	_, err = f.Write(content)
	if err == nil {
		err = syncFile(f)
	}
	return noSpace(errors.Join(err, f.Close()))
}

package metadata

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
)

// The first line of a side log is an entry of this kind whose key is the format.
const (
	headerKind = "format"
	formatName = "holdfast-sidelog-1"
)

// maxLine bounds a line of the side log, in bytes.
const maxLine = 1 << 20

// entry is one fact. Number counts the lines, so that a lost one is noticed; it
// goes on after a compaction.
type entry struct {
	Number uint64          `json:"n"`
	Kind   string          `json:"kind"`
	Key    string          `json:"key"`
	Value  json.RawMessage `json:"value,omitempty"` // absent: removed
}

// envelope is a line: the sum is CRC-32C over the bytes of the entry as they
// stand in the line.
type envelope struct {
	Sum   string          `json:"sum"`
	Entry json.RawMessage `json:"entry"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sum(b []byte) string { return fmt.Sprintf("%08x", crc32.Checksum(b, castagnoli)) }

// formatLine gives e as a line, with its newline.
func formatLine(e entry) ([]byte, error) {
	text, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	line, err := json.Marshal(envelope{Sum: sum(text), Entry: text})
	if err != nil {
		return nil, err
	}
	if len(line) >= maxLine {
		return nil, fmt.Errorf("%d bytes, at most %d fit in a line", len(line), maxLine)
	}
	return append(line, '\n'), nil
}

// parseLine reads a line, without its newline. Only what formatLine writes is accepted.
func parseLine(line []byte) (entry, error) {
	var env envelope
	var e entry
	if err := strictJSON(line, &env); err != nil {
		return e, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if got := sum(env.Entry); got != env.Sum {
		return e, fmt.Errorf("%w: checksum is %s, the line says %q", ErrDamaged, got, env.Sum)
	}
	if err := strictJSON(env.Entry, &e); err != nil {
		return e, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if e.Kind == "" {
		return e, fmt.Errorf("%w: entry without a kind", ErrDamaged)
	}
	if e.Kind == headerKind && e.Key != formatName {
		return e, fmt.Errorf("format %q is not known to this program (%s is)", e.Key, formatName)
	}
	return e, nil
}

func strictJSON(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if d.InputOffset() != int64(len(text)) {
		return fmt.Errorf("something follows the JSON value")
	}
	return nil
}

package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"strconv"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// decode reads a JSON object of at most Limits.Body bytes into v. Fields that v
// does not have are left alone: clients send back what they were given. The
// body is JSON whatever Content-Type says: curl -d says that it is a form, and
// authority comes in a header that no browser sends by itself.
func (c *call) decode(v any) error {
	b, err := c.readBody()
	if err != nil {
		return err
	}
	if b = bytes.TrimSpace(b); len(b) == 0 || b[0] != '{' {
		return invalid("body", "must be a JSON object")
	}
	return unmarshal(b, v)
}

// unmarshal reads a body. Text that is none is refused: encoding/json would take U+FFFD
// for it, and a caller would read another name than the one that he gave.
func unmarshal(b []byte, v any) error {
	if err := checkText(b); err != nil {
		return err
	}
	return explain(json.Unmarshal(b, v))
}

// checkText refuses what no text has: bytes that are not UTF-8, and halves of surrogate
// pairs.
func checkText(b []byte) error {
	for at := 0; at < len(b); {
		r, size := utf8.DecodeRune(b[at:])
		if r == utf8.RuneError && size == 1 {
			return invalid("body", "is not valid UTF-8 (at byte %d)", at+1)
		}
		if r == '\\' { // begins an escape sequence, which takes the next byte at least
			first := escaped(b[at:])
			size = 2
			if utf16.IsSurrogate(first) {
				if utf16.DecodeRune(first, escaped(b[min(at+6, len(b)):])) == utf8.RuneError {
					return invalid("body", "has half a surrogate pair, which is no character (at byte %d)", at+1)
				}
				size = 12
			}
		}
		at += size
	}
	return nil
}

// escaped gives the code of a \uXXXX that b begins with; 0 for none.
func escaped(b []byte) rune {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return 0
	}
	code, err := strconv.ParseUint(string(b[2:6]), 16, 16)
	if err != nil {
		return 0
	}
	return rune(code)
}

func (c *call) readBody() ([]byte, error) {
	limit := c.s.o.Limits.Body
	if c.r.ContentLength > limit {
		c.w.Header().Set("Connection", "close")
		return nil, refuse(ErrBodyTooLarge, "at most %d bytes are taken", limit)
	}
	b, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, limit))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, refuse(ErrBodyTooLarge, "at most %d bytes are taken", limit)
	case err != nil:
		c.w.Header().Set("Connection", "close")
		return nil, invalid("body", "broke off before its end")
	}
	// A deadline left behind would end the request's context while it works.
	_ = http.NewResponseController(c.w.ResponseWriter).SetReadDeadline(time.Time{})
	return b, nil
}

// explain says in a caller's words what encoding/json found wrong.
func explain(err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	var f *fault
	switch {
	case err == nil:
		return nil
	case errors.As(err, &f):
		return err
	case errors.As(err, &kind):
		field := kind.Field
		if field == "" {
			field = "body"
		}
		return invalid(field, "must be %s, not %s", jsonName(kind.Type.Kind().String()), kind.Value)
	case errors.As(err, &syntax):
		return invalid("body", "is not valid JSON: %v (at byte %d)", syntax, syntax.Offset)
	}
	return invalid("body", "is not valid JSON: %v", err)
}

func jsonName(kind string) string {
	switch kind {
	case "string":
		return "a string"
	case "map", "struct":
		return "an object"
	case "slice":
		return "an array"
	case "bool":
		return "true or false"
	default:
		return "a whole number"
	}
}

// maxMiB is the largest size whose bytes fit 63 bits.
const maxMiB = math.MaxInt64 >> 20

// mebibytes reads a size: absent or null is nil.
func mebibytes(field string, raw json.RawMessage) (*int64, error) {
	text := string(bytes.TrimSpace(raw))
	if text == "" || text == "null" {
		return nil, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange) && text[0] != '-', err == nil && n > maxMiB:
		return nil, invalid(field, "is in MiB; %s is more than any volume can have (%d)", clip(text, 32), int64(maxMiB))
	case errors.Is(err, strconv.ErrRange), err == nil && n < 1:
		return nil, invalid(field, "must be at least 1 (MiB), not %s", clip(text, 32))
	case err != nil:
		return nil, invalid(field, "must be a whole number of MiB, at least 1, not %s", clip(text, 32))
	}
	return &n, nil
}

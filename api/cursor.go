package api

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"

	"holdfast/engine"
)

// cursorLife is how long a cursor can be used.
const cursorLife = 24 * time.Hour

// cursor is a place in a listing as it travels: this JSON, and an HMAC over it
// and the query that it belongs to, so that it is good for nothing else.
type cursor struct {
	engine.Position
	Made int64 `json:"t"` // Unix seconds
}

// sealCursor makes the opaque text for a position in the listing that binding describes.
func (s *Server) sealCursor(p engine.Position, binding []byte) string {
	b, err := json.Marshal(cursor{Position: p, Made: s.now().Unix()})
	if err != nil {
		panic("api: cursor: " + err.Error())
	}
	return base64.RawURLEncoding.EncodeToString(append(s.cursorMAC(b, binding), b...))
}

// openCursor gives the position back; ErrBadCursor for every other text.
func (s *Server) openCursor(text string, binding []byte) (*engine.Position, error) {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) <= sha256.Size || strings.ContainsAny(text, "\r\n") { // which base64 skips
		return nil, refuse(ErrBadCursor, "cursor: not one that this query was given")
	}
	mac, payload := raw[:sha256.Size], raw[sha256.Size:]
	if !hmac.Equal(mac, s.cursorMAC(payload, binding)) {
		return nil, refuse(ErrBadCursor, "cursor: not one that this query was given (workspace, sort and filters must stay the same)")
	}
	var c cursor
	if err := json.Unmarshal(payload, &c); err != nil {
		return nil, refuse(ErrBadCursor, "cursor: unreadable")
	}
	if age := s.now().Sub(time.Unix(c.Made, 0)); age > cursorLife {
		return nil, refuse(ErrBadCursor, "cursor: older than 24 hours")
	}
	return &c.Position, nil
}

func (s *Server) cursorMAC(payload, binding []byte) []byte {
	query := sha256.Sum256(binding)
	m := hmac.New(sha256.New, s.o.Secret)
	m.Write([]byte("cursor.v1\x00")) // the secret also signs other things
	m.Write(query[:])
	m.Write(payload)
	return m.Sum(nil)
}

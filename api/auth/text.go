package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"hash/crc32"
	"strings"
)

// A key's text is "hf_", its id, "_", 256 random bits, and a CRC-32 of all that:
//
//	hf_0d1k8q4z1h6s9_<52 characters><7 characters>
//
// so that a scanner can find leaked ones and tell which key to revoke, and a
// typing error is told from a wrong key without a look at the keys.
const (
	textPrefix  = "hf_"
	idBytes     = 8
	secretBytes = 32
)

// encoding is base32hex in lower case, without padding: one case, no signs.
var encoding = base32.NewEncoding("0123456789abcdefghijklmnopqrstuv").WithPadding(base32.NoPadding)

var (
	idLength     = encoding.EncodedLen(idBytes)
	secretLength = encoding.EncodedLen(secretBytes)
	sumLength    = encoding.EncodedLen(crc32.Size)
)

// newText makes a key's id and its text.
func newText() (id, text string) {
	var b [idBytes + secretBytes]byte
	_, _ = rand.Read(b[:]) // never fails
	id = encoding.EncodeToString(b[:idBytes])
	body := textPrefix + id + "_" + encoding.EncodeToString(b[idBytes:])
	return id, body + checksum(body)
}

func checksum(body string) string {
	return encoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE([]byte(body))))
}

// parseText tells which key a text claims to be; false: it is none of ours.
func parseText(text string) (id string, ok bool) {
	if len(text) != len(textPrefix)+idLength+1+secretLength+sumLength || !strings.HasPrefix(text, textPrefix) {
		return "", false
	}
	body := text[:len(text)-sumLength]
	id, _, ok = strings.Cut(body[len(textPrefix):], "_")
	return id, ok && len(id) == idLength && checksum(body) == text[len(body):]
}

func hashText(text string) [sha256.Size]byte { return sha256.Sum256([]byte(text)) }

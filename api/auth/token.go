package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// signer makes and checks access tokens: JSON Web Tokens (RFC 7519) with
// HMAC-SHA-256. Only this one header is known: a token cannot choose another
// algorithm.
type signer struct{ key []byte }

const (
	issuer    = "holdfast"
	minSecret = 32
	maxToken  = 1024 // bytes
	// clockStep is how far a clock may have gone back since a token was made.
	clockStep = time.Minute
)

var tokenHeader = segment([]byte(`{"alg":"HS256","typ":"JWT"}`))

var errToken = errors.New("not a valid token")

type claims struct {
	Issuer  string `json:"iss"`
	Subject string `json:"sub"` // the key's id
	Issued  int64  `json:"iat"` // Unix seconds
	Expires int64  `json:"exp"`
}

func segment(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// newSigner derives its key, so that what else is signed with the secret is
// never a token.
func newSigner(secret []byte) (signer, error) {
	if len(secret) < minSecret {
		return signer{}, fmt.Errorf("a secret of %d bytes, at least %d are needed", len(secret), minSecret)
	}
	return signer{mac(secret, "holdfast access token")}, nil
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

func (s signer) token(id string, now time.Time, life time.Duration) string {
	body, err := json.Marshal(claims{issuer, id, now.Unix(), now.Add(life).Unix()})
	if err != nil {
		panic(fmt.Sprintf("auth: encode claims: %v", err)) // numbers and an id of ours
	}
	text := tokenHeader + "." + segment(body)
	return text + "." + segment(mac(s.key, text))
}

// verify gives the id of the key that a token stands for.
func (s signer) verify(token string, now time.Time) (id string, err error) {
	text, given, ok := cutLast(token, ".")
	body, mine := strings.CutPrefix(text, tokenHeader+".")
	if !ok || !mine || len(token) > maxToken {
		return "", errToken
	}
	signature, err := base64.RawURLEncoding.Strict().DecodeString(given)
	if err != nil || !hmac.Equal(signature, mac(s.key, text)) {
		return "", errToken
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil {
		return "", errToken
	}
	var c claims
	if err := json.Unmarshal(raw, &c); err != nil || c.Issuer != issuer {
		return "", errToken
	}
	if now.Unix() >= c.Expires || now.Add(clockStep).Unix() < c.Issued {
		return "", errToken
	}
	return c.Subject, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

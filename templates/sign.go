package templates

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"holdfast/blockdev"
)

// uploadLifetime is how long an upload URL is good for.
const uploadLifetime = time.Hour

// UploadPath is where the server takes uploads; an upload's id follows.
const UploadPath = "/uploads/"

// uploadURL gives the path and query that carry the right to upload one revision.
func (l *Library) uploadURL(id blockdev.ID, expires time.Time) string {
	at := strconv.FormatInt(expires.Unix(), 10)
	q := url.Values{"expires": {at}, "signature": {l.signature(string(id), at)}}
	return UploadPath + string(id) + "?" + q.Encode()
}

func (l *Library) signature(id, expires string) string {
	mac := hmac.New(sha256.New, l.o.Secret)
	fmt.Fprintf(mac, "holdfast upload 1\n%s\n%s\n", id, expires)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// checkURL verifies what an upload URL carried.
func (l *Library) checkURL(id, expires, signature string) error {
	if !hmac.Equal([]byte(signature), []byte(l.signature(id, expires))) {
		return fmt.Errorf("%w: its signature is wrong", ErrUploadGone)
	}
	at, err := strconv.ParseInt(expires, 10, 64)
	if err != nil || !l.now().Before(time.Unix(at, 0)) {
		return fmt.Errorf("%w: it has expired; ask for a new one", ErrUploadGone)
	}
	return nil
}

package api

import (
	"bytes"
	"compress/gzip"
	"net/http"
	"strings"

	"holdfast/api/ui"
)

// page is the page at /ui, as it is sent.
type page struct {
	html, zipped []byte
	policy       string
}

func newPage() *page {
	var p page
	p.html, p.policy = ui.Page()
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	_, _ = w.Write(p.html) // to memory: it cannot fail
	_ = w.Close()
	p.zipped = zipped.Bytes()
	return &p
}

// servePage gives the page to anybody: there is nothing in it but the page. It
// asks for a key.
func servePage(c *call) error {
	h := c.w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", c.s.page.policy)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Vary", "Accept-Encoding")
	body := c.s.page.html
	if strings.Contains(c.r.Header.Get("Accept-Encoding"), "gzip") {
		h.Set("Content-Encoding", "gzip")
		body = c.s.page.zipped
	}
	c.w.WriteHeader(http.StatusOK)
	_, err := c.w.Write(body)
	if err != nil {
		c.s.log.Debug("the page was not sent", "cause", err)
	}
	return nil
}

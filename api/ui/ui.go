package ui

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"strings"
)

//go:embed page.html
var page string

// Page is the page and the Content-Security-Policy to serve it under: its own
// script and style by their digests, requests to its own server, nothing else.
// What a tenant wrote into a name or a label can be no script.
func Page() (html []byte, policy string) {
	return []byte(page), strings.Join([]string{
		"default-src 'none'",
		"script-src " + digest("script"),
		"style-src " + digest("style"),
		"connect-src 'self'",
		"img-src data:",
		"base-uri 'none'",
		"form-action 'none'",
		"frame-ancestors 'none'",
		"require-trusted-types-for 'script'",
	}, "; ")
}

// digest names the contents of the page's one element of a kind, as CSP does
// (https://www.w3.org/TR/CSP3/#match-element-to-source-list).
func digest(element string) string {
	_, rest, found := strings.Cut(page, "<"+element+">")
	text, _, closed := strings.Cut(rest, "</"+element+">")
	if !found || !closed {
		panic("ui: the page has no element " + element)
	}
	sum := sha256.Sum256([]byte(text))
	return fmt.Sprintf("'sha256-%s'", base64.StdEncoding.EncodeToString(sum[:]))
}

package overlay

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"strings"
)

const (
	// maxPlainURL bounds an address that a person writes, in bytes.
	maxPlainURL = 1024
	// MaxPrefixes bounds how many prefixes there are, and maxPrefixBytes all of them
	// together: workers are told of them in one message.
	MaxPrefixes    = 64
	maxPrefixBytes = 32 << 10
)

// Prefixes are those of the addresses that an operator lets be fetched from, each
// "https://HOST/PATH/" or "http://HOST/PATH/". The zero value allows none.
type Prefixes struct {
	all   []*url.URL
	texts []string
}

// ParsePrefixes takes an operator's words. The errors are made to be read by him.
func ParsePrefixes(texts []string) (Prefixes, error) {
	p, bytes := Prefixes{}, 0
	for _, text := range texts {
		u, err := PlainURL(text)
		if !strings.HasSuffix(text, "/") && (err == nil || strings.Count(text, "/") == 2) {
			err = errors.New("it must end with a slash, so that it cannot be the beginning of another name")
		}
		if err != nil {
			return Prefixes{}, fmt.Errorf("%.200q: %w", text, err)
		}
		bytes += len(text)
		p.all, p.texts = append(p.all, u), append(p.texts, text)
	}
	if len(texts) > MaxPrefixes || bytes > maxPrefixBytes {
		return Prefixes{}, fmt.Errorf("%d prefixes of %d bytes: at most %d of %d are possible", len(texts), bytes, MaxPrefixes, maxPrefixBytes)
	}
	return p, nil
}

// Texts are what ParsePrefixes was given.
func (p Prefixes) Texts() []string { return p.texts }

// Empty tells whether nothing is allowed.
func (p Prefixes) Empty() bool { return len(p.all) == 0 }

// Allow tells whether an address is below one of the prefixes: of its scheme, host and
// port, with a path that can be read in one way and begins with the prefix's. What comes
// behind the path does not count.
func (p Prefixes) Allow(u *url.URL) bool {
	if u.User != nil || u.Opaque != "" || !plainPath(u) {
		return false
	}
	for _, a := range p.all {
		if a.Scheme == u.Scheme && hostPort(a) == hostPort(u) && strings.HasPrefix(u.Path, a.Path) {
			return true
		}
	}
	return false
}

// hostPort is who is asked, written in one way.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return strings.ToLower(u.Hostname()) + " " + port
}

// plainPath tells whether a path means the same to everybody who reads it.
func plainPath(u *url.URL) bool {
	clean := path.Clean(u.Path)
	if strings.HasSuffix(u.Path, "/") && clean != "/" {
		clean += "/"
	}
	return u.RawPath == "" && u.Path == clean
}

// PlainURL takes an address without anything that is secret, expires or can be read in
// two ways. No error has the address in it.
func PlainURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case len(text) > maxPlainURL || err != nil:
		return nil, errors.New("it is no URL") // url's own error repeats it, with what may be secret in it
	case u.Scheme != "https" && u.Scheme != "http", u.Host == "", u.Opaque != "":
		return nil, errors.New("it must begin with https://HOST/ or http://HOST/")
	case u.User != nil:
		return nil, errors.New("it names a user: what is fetched must be readable without one")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(text, "#"):
		return nil, errors.New("it has a query or a fragment: a signed URL expires, and volumes ask for blocks as long as they are not whole; give the store a policy that lets this host read")
	case !plainPath(u):
		return nil, errors.New("its path is not plain: it has %2F, //, . or .. in it")
	}
	return u, nil
}

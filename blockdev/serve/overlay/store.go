package overlay

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"holdfast/blockdev"
)

const (
	// MaxURL bounds the address of a base, in bytes.
	MaxURL = 4096

	// maxStoreConns bounds the connections of one client to one store. What more there is
	// to fetch waits for one of them.
	maxStoreConns = 16
	maxRedirects  = 3

	// connectTime bounds how long a store may take to accept a connection, and again for
	// its TLS; headTime how long until an answer begins. How long its bytes may take is
	// the caller's.
	connectTime = 10 * time.Second
	headTime    = 20 * time.Second

	maxHead = 64 << 10 // bytes of an answer's header
)

// CheckURL tells whether a base can be fetched from an address: http or https, with a
// host. blockdev.ErrInvalid, without what may be a secret in it.
func CheckURL(address string) error {
	u, err := url.Parse(address)
	switch {
	case err != nil:
		return fmt.Errorf("%w: the address of a base is none", blockdev.ErrInvalid)
	case len(address) > MaxURL:
		return fmt.Errorf("%w: the address of a base has %d bytes, at most %d are possible", blockdev.ErrInvalid, len(address), MaxURL)
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Opaque != "" || u.Fragment != "":
		return fmt.Errorf("%w: the address of a base is http:// or https:// with a host, and has no fragment", blockdev.ErrInvalid)
	}
	return nil
}

// StoreName is an address without what may be a secret in it, its user information and
// its query: for messages.
func StoreName(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return "a store whose address is none"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// StoreClient is the client that stores are asked with. dial nil: as the host has it.
// roots nil: the host's. It follows a redirect only to where allowed says, nil: nowhere,
// and at most three in a row: a store that sends it elsewhere could have it ask whatever
// the host can reach. Who is asked next is not told who was asked before, whose address
// may have secrets. Proxies are not used, whatever the environment says.
func StoreClient(dial func(ctx context.Context, network, address string) (net.Conn, error), roots *x509.CertPool, allowed func(*url.URL) bool) *http.Client {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return &http.Client{
		CheckRedirect: func(next *http.Request, via []*http.Request) error {
			next.Header.Del("Referer")
			to, first := *next.URL, via[0].URL
			if to.Host == first.Host && to.User.String() == first.User.String() {
				to.User = nil // not the store's word, but ours
			}
			return checkRedirect(&to, len(via), allowed)
		},
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				ctx, cancel := context.WithTimeout(ctx, connectTime)
				defer cancel()
				return dial(ctx, network, address)
			},
			TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, TLSHandshakeTimeout: connectTime,
			MaxConnsPerHost: maxStoreConns, MaxIdleConnsPerHost: maxStoreConns, IdleConnTimeout: time.Minute,
			ResponseHeaderTimeout: headTime, MaxResponseHeaderBytes: maxHead, DisableCompression: true,
		},
	}
}

// Trust makes roots those that a client of StoreClient trusts, before it has asked
// anybody for TLS: it reads none of the host's files then.
func Trust(client *http.Client, roots *x509.CertPool) error {
	t, ok := client.Transport.(*http.Transport)
	if !ok {
		return fmt.Errorf("%w: the client is none of a store", blockdev.ErrInvalid)
	}
	t.TLSClientConfig.RootCAs = roots
	return nil
}

func checkRedirect(to *url.URL, redirects int, allowed func(*url.URL) bool) error {
	switch {
	case allowed == nil || !allowed(to):
		return fmt.Errorf("%w: it redirects to %s, which is not below a prefix that its operator allows: allow that, or give the address that it redirects to", errStore, StoreName(to.String()))
	case redirects > maxRedirects:
		return fmt.Errorf("%w: it redirects without end", errStore)
	}
	return nil
}

// bare is an HTTP client's error without the address, which may have secrets in it.
func bare(err error) error {
	var with *url.Error
	if errors.As(err, &with) {
		return with.Err
	}
	return err
}

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
// roots nil: the host's. It follows a redirect only within one scheme, host and port,
// at most three in a row: a store that sends it elsewhere could have it ask whatever
// the host can reach, and would be sent what its address has of secrets. Proxies are not
// used, whatever the environment says.
func StoreClient(dial func(ctx context.Context, network, address string) (net.Conn, error), roots *x509.CertPool) *http.Client {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return &http.Client{
		CheckRedirect: checkRedirect,
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

func checkRedirect(next *http.Request, via []*http.Request) error {
	first := via[0].URL
	switch {
	case next.URL.Scheme != first.Scheme || next.URL.Host != first.Host:
		return fmt.Errorf("%w: it redirects to %s://%s, and another host is not followed: give the address that it redirects to", errStore, next.URL.Scheme, next.URL.Host)
	case len(via) > maxRedirects:
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

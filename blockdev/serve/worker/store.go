package worker

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/blockdev/serve/overlay"
)

// store is where a base far away is fetched from. Its address may change.
type store struct {
	address  atomic.Pointer[string]
	prefixes atomic.Pointer[overlay.Prefixes]
	resolver *resolver
	bundle   *os.File // of trusted certificates, to be read when they are wanted; nil: the host has none

	mu      sync.Mutex // of SetAddress
	clients []*http.Client
	trusted bool // the clients have the certificates
	remote  *overlay.Remote
}

// bundles are where hosts keep the certificates that they trust, as crypto/x509 knows it.
var bundles = []string{
	"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
	"/etc/pki/tls/cacert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
}

// openStore makes a source of a base far away. What needs the host's files is read here,
// or opened: later there are none. The digests stay open: they are read as they are
// needed.
//
// giveBack is called a while after the last fetch: the code of HTTP and its buffers are
// of no use to what is here.
func openStore(r wire.Remote, digests *os.File, giveBack func()) (*store, error) {
	chunks, err := overlay.ReadChunks(digests)
	if err != nil {
		return nil, err
	}
	s := &store{}
	if s.resolver, err = newResolver(); err != nil {
		return nil, err
	}
	if !secure(r) {
		if s.bundle, err = openBundle(); err != nil {
			return nil, fmt.Errorf("trusted certificates: %w", err)
		}
	}
	// Hydration has connections of its own, so that no reader's fetch waits for one.
	for range 2 {
		s.clients = append(s.clients, overlay.StoreClient(s.resolver.dial, nil, s.allowed))
	}
	if err := s.set(r); err != nil {
		return nil, err
	}
	rest := time.AfterFunc(restAfter, giveBack)
	fetch := func(i int) overlay.Fetch {
		f := overlay.HTTPFetchFrom(s.clients[i], func() string { return *s.address.Load() })
		return func(ctx context.Context, p []byte, off int64) error {
			defer rest.Reset(restAfter)
			return f(ctx, p, off)
		}
	}
	s.remote, err = overlay.NewRemote(chunks, fetch(0), overlay.RemoteOptions{Bulk: fetch(1)})
	return s, err
}

// openBundle opens the host's trusted certificates for an address to come.
func openBundle() (*os.File, error) {
	names := bundles
	if name := os.Getenv("SSL_CERT_FILE"); name != "" {
		names = []string{name}
	}
	for _, name := range names {
		f, err := os.Open(name)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	return nil, nil
}

func (s *store) allowed(u *url.URL) bool { return s.prefixes.Load().Allow(u) }

// set makes an address the one that is asked.
func (s *store) set(r wire.Remote) error {
	if err := overlay.CheckURL(r.URL); err != nil {
		return err
	}
	prefixes, err := overlay.ParsePrefixes(r.Prefixes)
	if err != nil {
		return fmt.Errorf("%w: %w", blockdev.ErrInvalid, err)
	}
	if !s.trusted && secure(r) {
		roots, err := s.roots()
		if err != nil {
			return fmt.Errorf("trusted certificates: %w", err)
		}
		for _, c := range s.clients { // nobody has asked for TLS yet
			if err := overlay.Trust(c, roots); err != nil {
				return err
			}
		}
		s.trusted = true
	}
	s.prefixes.Store(&prefixes)
	s.address.Store(&r.URL)
	return nil
}

// secure tells whether a base may be asked for with TLS.
func secure(r wire.Remote) bool {
	return strings.HasPrefix(r.URL, "https:") || slices.ContainsFunc(r.Prefixes, func(p string) bool { return strings.HasPrefix(p, "https:") })
}

// roots are the certificates that the host trusted when the worker began: half a MiB.
func (s *store) roots() (*x509.CertPool, error) {
	if s.address.Load() == nil { // it begins: all is still there
		return x509.SystemCertPool()
	}
	roots := x509.NewCertPool()
	if s.bundle == nil {
		return roots, nil
	}
	pem, err := io.ReadAll(io.NewSectionReader(s.bundle, 0, mostBundle))
	if err == nil {
		roots.AppendCertsFromPEM(pem)
		err = s.bundle.Close()
		s.bundle = nil
	}
	return roots, err
}

// mostBundle bounds what is read of trusted certificates, in bytes.
const mostBundle = 16 << 20

// setAddress has the base asked for elsewhere.
func (w *volume) setAddress(r *wire.Remote) error {
	if w.words.Refuse { // it asks nobody
		return nil
	}
	if w.store == nil {
		return fmt.Errorf("%w: its base is not far away", blockdev.ErrInvalid)
	}
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	before := *s.address.Load()
	if err := s.set(*r); err != nil || before == r.URL {
		return err
	}
	for _, c := range s.clients {
		c.CloseIdleConnections()
	}
	s.remote.Moved()
	return nil
}

package worker

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/blockdev/serve/nbd"
)

// exposedConnections bounds the connections of one exposure, those in the handshake
// among them: who has no certificate can have these, and not the places of clients.
const exposedConnections = 128

// restAfter is when memory is given back after somebody came or went: handshakes take
// what requests have no use for, certificates and the code that reads them most of all,
// and large requests leave buffers.
const restAfter = 2 * time.Second

// exposure is a way to the volume over the network.
type exposure struct {
	name     string
	listener net.Listener
	server   *nbd.Server
	terms    atomic.Pointer[tlsTerms] // those who connect from now on
	clients  int                      // that have the volume; under the front's mu
	closing  bool                     // under the front's mu: nobody is let in
	told     atomic.Int64             // when the log was told of a connection, in Unix seconds
}

// mayTell lets one connection a second be told of: strangers do not fill the log.
func (x *exposure) mayTell(now time.Time) bool {
	last := x.told.Load()
	return now.Unix() != last && x.told.CompareAndSwap(last, now.Unix())
}

// tlsTerms is what a client that connects is met with.
type tlsTerms struct {
	config *tls.Config
	met    string // as serve.Exposed says it
}

// expose begins or renews an exposure.
func (w *worker) expose(e *wire.Exposure, files []*os.File) error {
	defer wire.CloseAll(files)
	f, ok := w.volume.front.(*nbdFront)
	if !ok {
		return fmt.Errorf("%w: the volume is not served by NBD", blockdev.ErrInvalid)
	}
	config, err := secured(e)
	if err != nil {
		return err
	}
	words := serve.Exposure{Certificate: e.Certificate, Key: e.Key, Authorities: e.Authorities, Clients: e.Clients}
	m := &tlsTerms{config, words.Met()}
	if !e.Socket {
		return f.renew(e.Name, m)
	}
	return f.expose(e.Name, m, files[0])
}

func (w *worker) withdraw(name string, force bool) error {
	f, ok := w.volume.front.(*nbdFront)
	if !ok {
		return nil
	}
	return f.withdraw(name, force)
}

// secured makes an exposure's certificates those of a server.
func secured(e *wire.Exposure) (*tls.Config, error) {
	certificate, err := tls.X509KeyPair(e.Certificate, e.Key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", blockdev.ErrInvalid, err)
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(e.Authorities) {
		return nil, fmt.Errorf("%w: there is no certificate of an authority", blockdev.ErrInvalid)
	}
	names := e.Clients
	return &tls.Config{
		Certificates: []tls.Certificate{certificate}, ClientCAs: authorities, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, // each connection shows its certificate
		DynamicRecordSizingDisabled: true, // who waits for a disk gains nothing by small records
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(names) == 0 || slices.ContainsFunc(names, func(name string) bool { return isCalled(s.PeerCertificates[0], name) }) {
				return nil
			}
			return errors.New("the client's certificate is of nobody whom this export is for")
		},
	}, nil
}

// isCalled reports whether a certificate is of this name.
func isCalled(c *x509.Certificate, name string) bool {
	return c.Subject.CommonName == name || slices.ContainsFunc(c.DNSNames, func(dns string) bool { return strings.EqualFold(dns, name) })
}

// expose begins to take clients at a socket.
func (f *nbdFront) expose(name string, m *tlsTerms, socket *os.File) error {
	l, err := net.FileListener(socket)
	if err != nil {
		return fmt.Errorf("%w: %w", blockdev.ErrInvalid, err)
	}
	if _, ok := l.(*net.TCPListener); !ok {
		return errors.Join(fmt.Errorf("%w: no TCP socket", blockdev.ErrInvalid), l.Close())
	}
	x := &exposure{name: name, listener: l}
	x.terms.Store(m)
	x.server = nbd.NewServer(nbd.Options{
		TLS: &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return x.terms.Load().config, nil
		}},
		Unlisted: true, MaxConnections: exposedConnections, MaxInFlight: nbdInFlight, HandshakeTime: 10 * time.Second,
		Admit: func() func() { return f.admit(x) },
		Ended: func(_ net.Addr, err error) {
			f.restSoon()
			if x.mayTell(time.Now()) {
				tell(err)
			}
		},
	})
	if err := x.server.AddAs(name, f.export); err != nil {
		return errors.Join(err, l.Close())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.find(name) != nil || f.closed {
		return errors.Join(fmt.Errorf("%w: it is exposed by this name already", blockdev.ErrExists), l.Close())
	}
	f.exposures = append(f.exposures, x)
	f.rest()
	go func() { _ = x.server.Serve(l) }() // it ends with the server
	return nil
}

// restSoon has memory given back in a while.
func (f *nbdFront) restSoon() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rest()
}

// rest is restSoon for who has f.mu.
func (f *nbdFront) rest() {
	if f.resting || f.closed {
		return
	}
	f.resting = true
	time.AfterFunc(restAfter, func() {
		f.mu.Lock()
		f.resting = false
		f.mu.Unlock()
		f.w.giveBack()
	})
}

// find gives an exposure, nil for none. The caller has f.mu.
func (f *nbdFront) find(name string) *exposure {
	for _, x := range f.exposures {
		if x.name == name {
			return x
		}
	}
	return nil
}

// renew has clients that come from now on met with other certificates.
func (f *nbdFront) renew(name string, m *tlsTerms) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.find(name)
	if x == nil {
		return fmt.Errorf("%w: it is not exposed by this name", blockdev.ErrNotFound)
	}
	x.terms.Store(m)
	return nil
}

// admit gives a client of an exposure one of the places that all clients share.
func (f *nbdFront) admit(x *exposure) (leave func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if x.closing || f.here >= nbdConnections {
		return nil
	}
	f.here++
	x.clients++
	f.rest()
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.here--
		x.clients--
	}
}

// withdraw ends an exposure that nobody uses, or with force any.
func (f *nbdFront) withdraw(name string, force bool) error {
	f.mu.Lock()
	x := f.find(name)
	if x == nil {
		f.mu.Unlock()
		return nil
	}
	if n := x.clients; n > 0 && !force { // it changes once the lock is given back
		f.mu.Unlock()
		return fmt.Errorf("%w: %d clients are connected", blockdev.ErrBusy, n)
	}
	x.closing = true
	f.exposures = slices.DeleteFunc(f.exposures, func(o *exposure) bool { return o == x })
	f.mu.Unlock()
	return x.server.Close()
}

// exposed tells all exposures.
func (f *nbdFront) exposed() (all []serve.Exposed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, x := range f.exposures {
		all = append(all, serve.Exposed{Name: x.name, Address: x.listener.Addr().String(), Clients: x.clients, Met: x.terms.Load().met})
	}
	return all
}

// closeExposed ends all exposures.
func (f *nbdFront) closeExposed() error {
	f.mu.Lock()
	f.closed = true
	all := f.exposures
	f.exposures = nil
	f.mu.Unlock()
	var errs []error
	for _, x := range all {
		errs = append(errs, x.server.Close())
	}
	return errors.Join(errs...)
}

package export

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/serve"
)

// TLS is the transport of exports that are reached over the network.
const TLS = "tls"

// Network is where exports over TLS are reached. The files are PEM.
type Network struct {
	Address     netip.Addr // of this host, where workers listen
	Name        string     // that clients are told instead, which the certificate is for; "": the address
	First, Last int        // ports
	Certificate string     // file, with the chain
	Key         string     // file
	Authorities string     // file: certificates of those who sign clients' certificates
}

const (
	mostClients = 16
	// settleTime is how long a port that was given to one target, or was looked at as one's,
	// is not given to another: so long it may take from the choice to the first opening.
	settleTime = time.Minute
)

var clientsForm = regexp.MustCompile(`^$|^[A-Za-z0-9_.@-]{1,64}( [A-Za-z0-9_.@-]{1,64}){0,` + strconv.Itoa(mostClients-1) + `}$`)

func (n Network) check() error {
	switch {
	case !n.Address.IsValid():
		return fmt.Errorf("%w: no address", blockdev.ErrInvalid)
	case n.Certificate == "" || n.Key == "" || n.Authorities == "":
		return fmt.Errorf("%w: a certificate, its key and an authority are needed", blockdev.ErrInvalid)
	case n.First < 1 || n.Last < n.First || n.Last > 65535:
		return fmt.Errorf("%w: ports %d-%d", blockdev.ErrInvalid, n.First, n.Last)
	}
	return nil
}

// Expires reads the files and tells when the first of the server's certificates ends.
// blockdev.ErrInvalid for files that are of no use.
func (n Network) Expires() (time.Time, error) {
	_, expires, err := n.read()
	return expires, blockdev.Op("export.Expires", "", err)
}

// read gives the files' bytes, if they are of use.
func (n Network) read() (e serve.Exposure, expires time.Time, err error) {
	for _, one := range []struct {
		path string
		to   *[]byte
	}{{n.Certificate, &e.Certificate}, {n.Key, &e.Key}, {n.Authorities, &e.Authorities}} {
		if *one.to, err = os.ReadFile(one.path); err != nil {
			return e, expires, fmt.Errorf("%w: %w", blockdev.ErrInvalid, err)
		}
	}
	pair, err := tls.X509KeyPair(e.Certificate, e.Key)
	switch {
	case err != nil:
		return e, expires, fmt.Errorf("%w: %s and %s: %w", blockdev.ErrInvalid, n.Certificate, n.Key, err)
	case !x509.NewCertPool().AppendCertsFromPEM(e.Authorities):
		return e, expires, fmt.Errorf("%w: %s: no certificate is in it", blockdev.ErrInvalid, n.Authorities)
	case len(e.Certificate)+len(e.Key)+len(e.Authorities) > serve.MaxPEM:
		return e, expires, fmt.Errorf("%w: %s, %s and %s have more than %d bytes", blockdev.ErrInvalid, n.Certificate, n.Key, n.Authorities, serve.MaxPEM)
	}
	return e, pair.Leaf.NotAfter, nil
}

// network is a Network in use.
type network struct {
	Network
	mu    sync.Mutex
	given map[int]time.Time // ports, and when
}

// reserve chooses a port that is free and a name that nobody guesses. Another process
// may take the port before it is listened at: that shows then.
func (n *network) reserve() (port int, name string, err error) {
	if n == nil {
		return 0, "", fmt.Errorf("%w: target.transport: the operator has set no address where exports are reached over TLS (export_address)", blockdev.ErrInvalid)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	count := n.Last - n.First + 1
	begin := mathrand.IntN(count) //nolint:gosec // no secret: it spreads them
	for i := range count {
		port := n.First + (begin+i)%count
		if time.Since(n.given[port]) < settleTime {
			continue
		}
		l, err := n.listen(port)
		if errors.Is(err, blockdev.ErrBusy) {
			continue
		}
		if err != nil {
			return 0, "", err
		}
		n.given[port] = time.Now()
		return port, strings.ToLower(rand.Text()), l.Close()
	}
	return 0, "", fmt.Errorf("%w: all ports for exports over TLS are in use: the operator has set %d to %d (export_ports)", blockdev.ErrBusy, n.First, n.Last)
}

// keep has the port of a target be given to no other one for a while, also when nobody
// listens at it for a moment: its worker has ended, or its host has begun anew.
func (n *network) keep(t attach.Target) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.given[t.Port] = time.Now()
}

func (n *network) listen(port int) (*net.TCPListener, error) {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(n.Address, uint16(port)))) //nolint:gosec // checked
	if errors.Is(err, syscall.EADDRINUSE) {
		err = fmt.Errorf("%w: another process of the host listens at port %d", blockdev.ErrBusy, port)
	}
	return l, err
}

func (n *network) uri(t attach.Target) string {
	if n == nil {
		return "" // the operator has taken it away since
	}
	host := n.Name
	if host == "" {
		host = n.Address.String()
	}
	u := url.URL{Scheme: "nbds", Host: net.JoinHostPort(host, strconv.Itoa(t.Port)), Path: "/" + t.Export}
	return u.String()
}

// exposure is what a target's clients are met with, but for the socket.
func (n *network) exposure(t attach.Target) (serve.Exposure, error) {
	e, _, err := n.read()
	e.Name, e.Clients = t.Export, strings.Fields(t.Clients)
	return e, err
}

// expose has the volume's worker listen at the target's port, with the certificates
// that there are now.
func (a *Attacher) expose(ctx context.Context, r attach.Request) error {
	a.network.keep(r.Target)
	if a.network == nil {
		return fmt.Errorf("%w: the operator has set no address any more where exports are reached over TLS (export_address)", blockdev.ErrUnavailable)
	}
	e, err := a.network.exposure(r.Target)
	if err != nil {
		return err
	}
	err = a.pool.Expose(ctx, r.Volume, e) // if it listens already
	if !errors.Is(err, blockdev.ErrNotFound) {
		return err
	}
	l, err := a.network.listen(r.Target.Port)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }() // the worker has its own
	if e.Socket, err = l.File(); err != nil {
		return err
	}
	defer e.Socket.Close()
	return a.pool.Expose(ctx, r.Volume, e)
}

func (a *Attacher) withdraw(ctx context.Context, r attach.Request) error {
	s, err := a.pool.Observe(ctx, r.Volume)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, x := range s.Exposed {
		if x.Name == r.Target.Export && x.Clients > 0 && !r.Lazy {
			return inUse{x.Clients}
		}
	}
	err = a.pool.Withdraw(ctx, r.Volume, r.Target.Export, r.Lazy)
	if errors.Is(err, blockdev.ErrBusy) { // who came in between
		return inUse{1}
	}
	return err
}

// exposed looks for the target's way to the volume. One with other certificates than
// the operator has now is missing: it is made anew, and nobody's connection ends.
func (a *Attacher) exposed(s serve.Service, t attach.Target) attach.State {
	for _, x := range s.Exposed {
		if x.Name != t.Export {
			continue
		}
		if a.network == nil {
			return attach.StateAttached
		}
		now, err := a.network.exposure(t)
		if err == nil && now.Met() != x.Met { // files that are being replaced are looked at again later
			return attach.StateMissing
		}
		return attach.StateAttached
	}
	return attach.StateMissing
}

package nbd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/blockdev"
)

// authority signs certificates for a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	dir  string // with the names that other makers' clients look for
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	a := &authority{t: t, key: key, dir: t.TempDir()}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, &key.PublicKey, key)
	must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	must(t, err)
	a.write("ca-cert.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) write(name, kind string, der []byte) {
	a.t.Helper()
	must(a.t, os.WriteFile(filepath.Join(a.dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

// sign makes a certificate for a role, "server" or "client".
func (a *authority) sign(role string) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(a.t, err)
	usage := map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth}[role]
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: role}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, a.cert, &key.PublicKey, a.key)
	must(a.t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(a.t, err)
	a.write(role+"-cert.pem", "CERTIFICATE", der)
	a.write(role+"-key.pem", "PRIVATE KEY", private)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// serverConfig wants certificates of clients.
func (a *authority) serverConfig() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{a.sign("server")}, ClientCAs: a.pool(), ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12}
}

func (a *authority) clientConfig() *tls.Config {
	return &tls.Config{RootCAs: a.pool(), ServerName: "localhost", Certificates: []tls.Certificate{a.sign("client")}, MinVersion: tls.VersionTLS12}
}

// servingTCP serves on a loopback port.
func servingTCP(t *testing.T, o Options, exports ...*Export) *net.TCPAddr {
	t.Helper()
	s := NewServer(o)
	for _, e := range exports {
		must(t, s.Add(e))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		must(t, s.Close())
		must(t, <-served)
	})
	return l.Addr().(*net.TCPAddr)
}

func dialTCP(t *testing.T, addr net.Addr) *client {
	t.Helper()
	conn, err := net.Dial("tcp", addr.String())
	must(t, err)
	return meet(t, conn)
}

// secure changes to TLS.
func (c *client) secure(config *tls.Config) error {
	c.t.Helper()
	if got := c.last(optStartTLS, nil); got != repAck {
		c.t.Fatalf("STARTTLS: %#x", got)
	}
	secured := tls.Client(c.Conn, config)
	if err := secured.Handshake(); err != nil {
		return err
	}
	c.Conn = secured
	return nil
}

func TestTLS(t *testing.T) {
	a := newAuthority(t)
	addr := servingTCP(t, Options{TLS: a.serverConfig()}, export(t, "v", image(t, 8*mib, 0), ExportOptions{}))
	c := dialTCP(t, addr)
	for _, opt := range []uint32{optList, optInfo, optGo, optStructuredReply, optSetMetaContext, 999} {
		if got := c.last(opt, goBytes("v")); got != repErrTLSReqd {
			t.Errorf("option %d in the clear: %#x", opt, got)
		}
	}
	must(t, c.secure(a.clientConfig()))
	if got := c.last(optStartTLS, nil); got != repErrInvalid {
		t.Errorf("TLS in TLS: %#x", got)
	}
	if got := c.last(optSetMetaContext, metaBytes("v", contextAllocation)); got != repErrInvalid {
		t.Errorf("structured replies outlived STARTTLS: %#x", got)
	}
	c.structured("v")
	modelled(t, c, 8*mib, 200)

	plain := dialTCP(t, addr)
	plain.write(optionBytes(optExportName, []byte("v")))
	plain.ended()
}

// TestStrangersOverTLS: who has no certificate, or one of another authority, gets
// nowhere; what is sent in the clear behind STARTTLS is not obeyed.
func TestStrangersOverTLS(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	addr := servingTCP(t, Options{TLS: a.serverConfig()}, export(t, "v", image(t, mib, 0), ExportOptions{}))
	for name, config := range map[string]*tls.Config{
		"no certificate":    {RootCAs: a.pool(), ServerName: "localhost"},
		"another authority": {RootCAs: a.pool(), ServerName: "localhost", Certificates: []tls.Certificate{other.sign("client")}},
	} {
		c := dialTCP(t, addr)
		// With TLS 1.3 the client learns of it by its first read.
		if err := c.secure(config); err == nil {
			c.write(optionBytes(optList, nil))
			if n, err := c.Read(make([]byte, 1)); err == nil {
				t.Errorf("%s: the server answered %d bytes", name, n)
			}
		}
	}
	c := dialTCP(t, addr)
	c.write(append(optionBytes(optStartTLS, nil), optionBytes(optList, nil)...))
	c.read(20)
	rest, err := io.ReadAll(c)
	if len(rest) > 0 && rest[0] == byte(magicReply>>56) && binary.BigEndian.Uint64(rest) == magicReply {
		t.Errorf("an option in the clear behind STARTTLS is answered: %x %v", rest, err)
	}
}

func TestPlainTCPIsRefused(t *testing.T) {
	s := NewServer(Options{})
	defer s.Close()
	for _, where := range []struct {
		addr  string
		plain bool
	}{{"127.0.0.1:0", false}, {"0.0.0.0:0", true}, {"0.0.0.0:0", false}} {
		s.options.PlainLoopback = where.plain
		l, err := net.Listen("tcp", where.addr)
		must(t, err)
		if err := s.Serve(l); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("%s is served in the clear: %v", where.addr, err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the refused listener is open: %v", err)
		}
	}
	addr := servingTCP(t, Options{PlainLoopback: true}, export(t, "v", image(t, mib, 0), ExportOptions{}))
	c := dialTCP(t, addr).enter("v")
	c.ok(cmdWrite, 0, 0, 4096, pattern(4096, 1))
	c.reads(0, pattern(4096, 1))
}

// TestUnlisted: who does not know an export's name does not learn it, also not by the
// empty one; who has it is asked about before anything is served.
func TestUnlisted(t *testing.T) {
	s := NewServer(Options{Unlisted: true, Admit: func() func() { return nil }})
	defer s.Close()
	e := export(t, "", image(t, mib, 0), ExportOptions{})
	must(t, s.AddAs("secret", e))
	if err := s.AddAs("secret", e); !errors.Is(err, blockdev.ErrExists) {
		t.Errorf("twice: %v", err)
	}
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- s.ServeConn(theirs) }()
	c := meet(t, ours)
	if got := c.last(optList, nil); got != repErrPolicy {
		t.Errorf("asked for a list: %#x", got)
	}
	for name, want := range map[string]uint32{"": repErrUnknown, "guess": repErrUnknown, "secret": repAck} {
		if got := c.last(optInfo, goBytes(name)); got != want {
			t.Errorf("asked about %q: %#x", name, got)
		}
	}
	if got := c.last(optGo, goBytes("secret")); got != repAck {
		t.Errorf("GO: %#x", got)
	}
	if err := <-served; !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("one who is not admitted: %v", err)
	}
}

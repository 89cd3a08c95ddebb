package bench

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control"
)

// tlsName is the name of an export, and of the host in a server's certificate.
const tlsName = "localhost"

// pki is a directory with certificates of an authority, a server and a client: QEMU, nbdkit
// and libnbd call the files alike.
type pki string

// newPKI makes what NBD clients of HOME look for, and servers as well, unless it is there.
func newPKI(home string) (pki, error) {
	dir := pki(filepath.Join(home, ".pki", "libnbd"))
	if _, err := os.Stat(dir.file("client-key.pem")); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return "", err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	authority := certificate(1, "bench authority")
	authority.IsCA, authority.KeyUsage = true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, &key.PublicKey, key)
	if err != nil {
		return "", err
	}
	return dir, errors.Join(dir.write("ca-cert.pem", "CERTIFICATE", der),
		dir.sign(authority, key, 2, "server", x509.ExtKeyUsageServerAuth), dir.sign(authority, key, 3, "client", x509.ExtKeyUsageClientAuth))
}

func certificate(serial int64, name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(7 * 24 * time.Hour),
	}
}

// sign makes the certificate of a role, and its key.
func (d pki) sign(authority *x509.Certificate, by *ecdsa.PrivateKey, serial int64, role string, usage x509.ExtKeyUsage) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	c := certificate(serial, role)
	c.KeyUsage, c.ExtKeyUsage, c.DNSNames = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{usage}, []string{tlsName}
	der, err := x509.CreateCertificate(rand.Reader, c, authority, &key.PublicKey, by)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(d.write(role+"-cert.pem", "CERTIFICATE", der), d.write(role+"-key.pem", "PRIVATE KEY", private))
}

func (d pki) file(name string) string { return filepath.Join(string(d), name) }

func (d pki) write(name, kind string, der []byte) error {
	return os.WriteFile(d.file(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// expose has a worker listen at a port of the loopback address, as the daemon does, and
// tells the port.
func (d pki) expose(ctx context.Context, w *control.Worker) (port int, err error) {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return 0, err
	}
	defer func() { _ = l.Close() }() // the worker has its own
	e := serve.Exposure{Name: tlsName}
	if e.Socket, err = l.File(); err != nil {
		return 0, err
	}
	defer e.Socket.Close()
	for name, to := range map[string]*[]byte{"server-cert.pem": &e.Certificate, "server-key.pem": &e.Key, "ca-cert.pem": &e.Authorities} {
		if *to, err = os.ReadFile(d.file(name)); err != nil {
			return 0, err
		}
	}
	return l.Addr().(*net.TCPAddr).Port, w.Expose(ctx, e) //nolint:forcetypeassert // it is a TCP listener
}

// freePort is one that nobody listened at a moment ago.
func freePort() (int, error) {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close() //nolint:forcetypeassert // it is a TCP listener
}

func (b *IO) pki() (pki, error) { return newPKI(b.Dir) }

// nbds has a path's jobs done over TLS at a port. The client has no way to be told where
// its certificates are but its home, which it does not look at as root: it runs as nobody
// of a user namespace, who may do what its files' owner may.
func (p *ioPath) nbds(b *IO, s *ioServer, port int, export string) {
	p.server, p.close = s.pid, s.stop
	p.by = fioBy{before: []string{"unshare", "--user"}, env: []string{"HOME=" + b.Dir}}
	p.fio(b, "ioengine=nbd", fmt.Sprintf("uri=nbds://%s:%d/%s", tlsName, port, export))
}

// tlsWays are NBD over TLS on the loopback address, with certificates on both sides.
func tlsWays() []ioWay {
	return []ioWay{
		{"nbd-tls", "NBD over TLS", aloneOrMany, ownTLS},
		{"qemu-nbd-tls", "qemu-nbd over TLS", aloneOrMany, qemuTLS},
		{"nbdkit-tls", "nbdkit's file plugin over TLS", func(j ioJob) bool { return aloneOrMany(j) && !j.writes() }, nbdkitTLS},
	}
}

// aloneOrMany are random reads and writes of 4 KiB, and large ones in order.
func aloneOrMany(j ioJob) bool {
	return again(j) && !j.flush && (j.block == 4<<10 || j.block == 1<<20) && (j.reads == 0 || j.reads == 100)
}

func ownTLS(_ context.Context, b *IO, p *ioPath) error {
	dir, err := b.pki()
	if err != nil {
		return err
	}
	s, err := startOwn(b.Program, ServeOptions{Image: b.image, Kind: blockdev.NBD, Certificates: string(dir)})
	if err == nil {
		p.nbds(b, s, s.port, tlsName)
	}
	return err
}

func qemuTLS(ctx context.Context, b *IO, p *ioPath) error {
	return b.peerOverTLS(ctx, p, func(dir pki, port string) []string {
		return []string{
			"qemu-nbd", "--object", "tls-creds-x509,id=creds,endpoint=server,verify-peer=yes,dir=" + string(dir), "--tls-creds=creds", "--bind=127.0.0.1", "--port=" + port,
			"--format=raw", "--cache=none", "--aio=io_uring", "--discard=unmap", "--persistent", "--shared=8", "--export-name=" + tlsName, b.image,
		}
	})
}

// nbdkitTLS has an image of its own, as nbdkit has.
func nbdkitTLS(ctx context.Context, b *IO, p *ioPath) error {
	image := filepath.Join(b.Dir, "cached-tls")
	if err := fillImage(image, b.size); err != nil {
		return err
	}
	return b.peerOverTLS(ctx, p, func(dir pki, port string) []string {
		return []string{"nbdkit", "--foreground", "--ipaddr=127.0.0.1", "--port=" + port, "--tls=require", "--tls-verify-peer", "--tls-certificates=" + string(dir), "file", image}
	})
}

// peerOverTLS starts somebody else's server at a free port.
func (b *IO) peerOverTLS(ctx context.Context, p *ioPath, args func(dir pki, port string) []string) error {
	dir, err := b.pki()
	if err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	number := strconv.Itoa(port)
	s, err := startPeerAt(ctx, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}, b.socket(p)+".log", args(dir, number))
	if err == nil {
		p.nbds(b, s, port, tlsName)
	}
	return err
}

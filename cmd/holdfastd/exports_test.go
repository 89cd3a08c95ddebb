package main_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/sys"
)

// authority signs certificates; the files have the names that NBD clients look for.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	a := &authority{t: t, dir: t.TempDir(), key: key, cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, &key.PublicKey, key)
	must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	must(t, err)
	writePEM(t, filepath.Join(a.dir, "ca-cert.pem"), "CERTIFICATE", der)
	return a
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

// sign writes a certificate and its key, as ROLE-cert.pem and ROLE-key.pem.
func (a *authority) sign(role, name string) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(a.t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth}[role]},
	}, a.cert, &key.PublicKey, a.key)
	must(a.t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(a.t, err)
	writePEM(a.t, filepath.Join(a.dir, role+"-cert.pem"), "CERTIFICATE", der)
	writePEM(a.t, filepath.Join(a.dir, role+"-key.pem"), "PRIVATE KEY", private)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// client is the configuration of a client with a certificate, or none.
func (a *authority) client(certificates ...tls.Certificate) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return &tls.Config{RootCAs: pool, ServerName: "localhost", Certificates: certificates}
}

// exportingNode has exports over TLS on the loopback address.
func exportingNode(t *testing.T, a *authority) *node {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.NBD)
	a.sign("server", "this host")
	file := func(name string) string { return filepath.Join(a.dir, name) }
	return newNode(t, "--worker", buildWorker(t), "--export-address", "127.0.0.1", "--export-name", "localhost", "--export-ports", "20810-24809",
		"--export-cert", file("server-cert.pem"), "--export-key", file("server-key.pem"), "--export-client-ca", file("ca-cert.pem"))
}

// place is where an attachment says that it is.
func place(t *testing.T, a client.Attachment) (address, name string) {
	t.Helper()
	if a.Launch == nil {
		t.Fatalf("attached: %+v", a)
	}
	u, err := url.Parse(a.Launch.URI)
	must(t, err)
	if u.Scheme != "nbds" || u.Hostname() != "localhost" || len(u.Path) < 20 {
		t.Fatalf("it is at %s", u)
	}
	return "127.0.0.1:" + u.Port(), strings.TrimPrefix(u.Path, "/")
}

// load writes and reads a block until it is told to stop.
type load struct {
	stop   context.CancelFunc
	rounds chan int // how many it has made; the last when it ends
	err    chan error
}

func loadOn(ctx context.Context, f blockdevtest.File) *load {
	l := &load{rounds: make(chan int, 1), err: make(chan error, 1)}
	ctx, l.stop = context.WithCancel(ctx)
	go func() {
		b, got := make([]byte, 4096), make([]byte, 4096)
		for n := 1; ; n++ {
			copy(b, strconv.Itoa(n))
			off := int64(n%512) * 4096
			_, err := f.WriteAt(b, off)
			if err == nil && n%16 == 0 {
				err = f.(interface{ Sync() error }).Sync()
			}
			if err == nil {
				_, err = f.ReadAt(got, off)
			}
			if err == nil && string(got) != string(b) {
				err = errors.New("it reads other bytes than were written")
			}
			if err != nil || ctx.Err() != nil {
				l.err <- err
				return
			}
			select {
			case <-l.rounds:
			default:
			}
			l.rounds <- n
		}
	}()
	return l
}

// more waits until it has made so many rounds from now on.
func (l *load) more(t *testing.T, rounds int) {
	t.Helper()
	for until, deadline := -1, time.After(patience); ; {
		select {
		case n := <-l.rounds:
			if until < 0 {
				until = n + rounds
			}
			if n >= until {
				return
			}
		case err := <-l.err:
			t.Fatalf("a request failed: %v", err)
		case <-deadline:
			t.Fatal("no request is answered")
		}
	}
}

// TestExportsOverTLS: clients of other makers reach a volume at a port of the host with
// certificates, and nobody without; connections outlive the daemon, the port outlives
// the worker, and certificates are replaced while it is there.
func TestExportsOverTLS(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	n, ctx := exportingNode(t, a), t.Context()
	mine, theirs, alien := a.sign("client", "backup"), a.sign("client", "somebody"), other.sign("client", "backup")
	n.create("v", client.VolumeSpec{Size: 64})
	target := client.Target{Type: "export", Protocol: "nbd", Transport: "tls", Clients: []string{"else", "backup"}}
	at, err := n.Attach(ctx, "v", client.Attachment{Holder: "agent:backup", Target: target})
	must(t, err)
	address, name := place(t, at)

	for what, c := range map[string]struct {
		name   string
		config *tls.Config
	}{
		"no certificate":    {name, a.client()},
		"another authority": {name, a.client(alien)},
		"another name":      {name, a.client(theirs)},
		"a guessed export":  {"v", a.client(mine)},
		"the only export":   {"", a.client(mine)},
	} {
		if f, err := blockdevtest.DialNBDS(address, c.name, c.config); err == nil {
			t.Errorf("%s is let in", what)
			must(t, f.Close())
		}
	}

	f, err := blockdevtest.DialNBDS(address, name, a.client(mine))
	must(t, err)
	l := loadOn(ctx, f)
	defer l.stop()
	l.more(t, 10)
	n.kill()
	l.more(t, 100)
	n.start()
	l.more(t, 100)
	if _, err := n.Detach(ctx, "v", at.ID); err == nil || !strings.Contains(err.Error(), "a client is connected") {
		t.Errorf("detached under a client: %v", err)
	}

	renewed := a.sign("server", "this host")
	same, err := n.Attach(ctx, "v", client.Attachment{Holder: "agent:backup", Target: target}) // looks at it at once
	must(t, err)
	meets := a.client(mine)
	meets.VerifyConnection = func(s tls.ConnectionState) error {
		if !bytes.Equal(s.PeerCertificates[0].Raw, renewed.Certificate[0]) {
			return errors.New("the certificate before")
		}
		return nil
	}
	fresh, err := blockdevtest.DialNBDS(address, name, meets)
	if err != nil || same.ID != at.ID {
		t.Fatalf("after its renewal, attached as %s (was %s): %v", same.ID, at.ID, err)
	}
	must(t, fresh.Close())
	l.more(t, 10)

	must(t, syscall.Kill(workerOf(t, at.Socket), syscall.SIGKILL))
	if err := <-l.err; err == nil {
		t.Error("the worker was killed, and no request noticed")
	}
	again := dialAgain(t, address, name, a.client(mine))
	must(t, again.Close())

	a.sign("client", "backup")
	uri := strings.Replace(at.Launch.URI, "?", "", 1) + "?tls-certificates=" + url.QueryEscape(a.dir)
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, []byte(strings.Repeat("holdfast", 64<<17)), 0o600))
	run(t, "nbdcopy", image, uri)
	copied := filepath.Join(t.TempDir(), "copied")
	run(t, "nbdcopy", uri, copied)
	if got, err := os.ReadFile(copied); err != nil || len(got) != 64<<20 || string(got[:16]) != "holdfastholdfast" {
		t.Errorf("copied %d bytes, %v", len(got), err)
	}
	if said := run(t, "nbdinfo", "--size", uri); strings.TrimSpace(said) != strconv.Itoa(64<<20) {
		t.Errorf("nbdinfo says %s", said)
	}
	host, port, err := net.SplitHostPort(address)
	must(t, err)
	run(t, "qemu-img", "compare", "--object", "tls-creds-x509,id=tls,endpoint=client,dir="+a.dir, "--image-opts",
		"driver=raw,file.driver=nbd,file.host="+host+",file.port="+port+",file.export="+name+",file.tls-creds=tls", "driver=raw,file.driver=file,file.filename="+copied)

	_, err = n.Detach(ctx, "v", at.ID)
	must(t, err)
	if _, err := net.Dial("tcp", address); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the port of a volume that is detached: %v", err)
	}
}

// TestLimitsOverTLS: the limits of an attachment hold for all who have the volume over TLS
// together, and can be lifted meanwhile; what they do is counted as it is of others.
func TestLimitsOverTLS(t *testing.T) {
	a := newAuthority(t)
	n, ctx := exportingNode(t, a), t.Context()
	mine := a.sign("client", "backup")
	n.create("v", client.VolumeSpec{Size: 64})
	at, err := n.Attach(ctx, "v", client.Attachment{Holder: "agent:backup", Target: client.Target{Type: "export", Protocol: "nbd", Transport: "tls"}, Limits: &client.RateLimits{WriteIOPS: 100}})
	must(t, err)
	address, name := place(t, at)
	const clients, writes, size = 2, 60, 4096
	round := func() time.Duration {
		ended, began := make(chan error, clients), time.Now()
		for range clients {
			f, err := blockdevtest.DialNBDS(address, name, a.client(mine))
			must(t, err)
			defer f.Close()
			go func() {
				var err error
				for n := 0; n < writes && err == nil; n++ {
					_, err = f.WriteAt(make([]byte, size), int64(n)*size)
				}
				ended <- err
			}()
		}
		for range clients {
			must(t, <-ended)
		}
		took := time.Since(began)
		for deadline := time.Now().Add(patience); ; { // those of the round before may still be on their way out
			io, err := n.IO(ctx, "v")
			must(t, err)
			if io.Worker != nil && io.Worker.Clients == clients && io.Worker.Inside == 0 {
				return took
			}
			if time.Now().After(deadline) {
				t.Fatalf("with %d clients: %+v", clients, io.Worker)
			}
		}
	}
	if took, least := round(), 900*time.Millisecond; took < least { // 120 at 100 a second, 10 of them at once
		t.Errorf("%d writes took %v, at least %v were expected", clients*writes, took, least)
	}
	io, err := n.IO(ctx, "v")
	must(t, err)
	w := io.Worker
	if served := w.Requests["write"]; served.Requests != clients*writes || served.Bytes != clients*writes*size || served.Errors != 0 || served.P50 <= 0 {
		t.Errorf("counted: %+v", served)
	}
	if io.Counters == nil || io.Counters.Writes != clients*writes || io.Counters.WriteBytes != clients*writes*size {
		t.Errorf("counters: %+v", io.Counters)
	}
	if w.Waiting["throttle"].Seconds <= 0 || w.Limits == nil || w.Limits.WriteIOPS != 100 {
		t.Errorf("limits %+v, waited %+v", w.Limits, w.Waiting)
	}
	_, err = n.SetLimits(ctx, "v", at.ID, client.RateLimits{})
	must(t, err)
	throttled := w.Waiting["throttle"].Seconds
	round()
	io, err = n.IO(ctx, "v")
	must(t, err)
	if w := io.Worker; w.Waiting["throttle"].Seconds != throttled || w.Limits != nil && *w.Limits != (client.RateLimits{}) || w.Requests["write"].Requests != 2*clients*writes {
		t.Errorf("without limits: %+v", w)
	}
}

// dialAgain connects once the next worker listens.
func dialAgain(t *testing.T, address, name string, config *tls.Config) blockdevtest.File {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		f, err := blockdevtest.DialNBDS(address, name, config)
		if err == nil {
			return f
		}
		if time.Now().After(deadline) {
			t.Fatalf("nobody listens at the port again: %v", err)
		}
	}
}

// workerOf is the process that listens at a socket.
func workerOf(t *testing.T, socket string) int {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	must(t, err)
	defer conn.Close()
	peer, err := sys.PeerOf(conn.(*net.UnixConn))
	must(t, err)
	return peer.Pid
}

// run runs a client of another maker and gives its output.
func run(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

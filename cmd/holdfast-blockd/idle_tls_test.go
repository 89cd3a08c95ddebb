package main_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve"
)

// TestIdleOverTLS: what a handshake took is given back while its client stays.
func TestIdleOverTLS(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	w, err := s.Serve(ctx, flat(t, blockdev.NBD))
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	socket, err := l.(*net.TCPListener).File()
	must(t, err)
	defer socket.Close()
	c, authority := certified(t, "localhost")
	private, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	must(t, err)
	must(t, w.Expose(ctx, serve.Exposure{
		Name: "idle", Socket: socket, Certificate: []byte(authority), Authorities: []byte(authority),
		Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
	}))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(authority))
	f, err := blockdevtest.DialNBDS(l.Addr().String(), "idle", &tls.Config{RootCAs: roots, ServerName: "localhost", Certificates: []tls.Certificate{c}})
	must(t, err)
	_, err = f.WriteAt(stamped(1), 0)
	must(t, err)
	resident(t, w.Pid(), "with a client over TLS")
	_, err = f.ReadAt(make([]byte, block), 0)
	must(t, err)
	must(t, f.Close())
	must(t, w.Stop(ctx))
}

package main_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestTLS: with certificate files the TCP address speaks TLS alone, and upload
// URLs say https.
func TestTLS(t *testing.T) {
	certificate, key, pool := selfSigned(t)
	n := newNode(t, "--tls-cert", certificate, "--tls-key", key)
	b, err := os.ReadFile(filepath.Join(n.state, "listen"))
	must(t, err)
	address := strings.TrimSpace(string(b))
	secret, err := os.ReadFile(filepath.Join(n.state, "dev.key"))
	must(t, err)

	c := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, Timeout: 10 * time.Second}
	defer c.CloseIdleConnections()
	ask := func(method, url, body string) (*http.Response, error) {
		req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
		must(t, err)
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(secret)))
		resp, err := c.Do(req)
		if err == nil {
			must(t, resp.Body.Close())
		}
		return resp, err
	}
	resp, err := ask("PUT", "https://"+address+"/v0/volume_templates/secure?upload=true", `{}`)
	if err != nil || resp.StatusCode != http.StatusOK || !strings.HasPrefix(resp.Header.Get("X-Blaxel-Upload-Url"), "https://"+address+"/") {
		t.Fatalf("%+v, %v", resp, err)
	}
	if resp.TLS.Version < tls.VersionTLS12 {
		t.Errorf("TLS version %x", resp.TLS.Version)
	}
	if resp, err := ask("GET", "http://"+address+"/v0/volumes", ""); err == nil && resp.StatusCode == http.StatusOK {
		t.Error("the address answers in clear as well")
	}
}

// selfSigned writes a certificate for the loopback address.
func selfSigned(t *testing.T) (certificate, key string, pool *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "holdfast test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "holdfast test"}}, &private.PublicKey, private)
	must(t, err)
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	must(t, err)
	dir := t.TempDir()
	certificate, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	must(t, os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded}), 0o600))
	parsed, err := x509.ParseCertificate(der)
	must(t, err)
	pool = x509.NewCertPool()
	pool.AddCert(parsed)
	return certificate, key, pool
}

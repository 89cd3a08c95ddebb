package main_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
)

// asHost has TestStoreByName run on a host of its own: with a network and an /etc that
// nobody else sees.
const asHost = "BLOCKD_TEST_HOST"

// TestStoreByName: a worker, which has no files, finds stores by a name server and by
// /etc/hosts, trusts those that the host trusts and no others, follows them where it is
// allowed to, and goes on at another address, also with TLS when it began without.
func TestStoreByName(t *testing.T) {
	if os.Getenv(asHost) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestStoreByName$", "-test.count=1")
		cmd.Env = append(os.Environ(), asHost+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		out, err := cmd.CombinedOutput()
		if t.Log(string(out)); err != nil {
			t.Fatal(err)
		}
		return
	}
	s, store := starter(t, nil), newFarStore(t) // while there still is what builds the program
	store.answer()
	certificate, authority := certified(t, "byserver.test", "byhosts.test")
	ownHost(t, map[string]string{
		"/etc/resolv.conf": "# ours\nnameserver 127.0.0.1\n", "/etc/hosts": "127.0.0.1 other byhosts.test # ours\n", "/etc/ssl/certs/ca-certificates.crt": authority,
	})
	answerNames(t, "byserver.test.")
	routes := http.NewServeMux()
	routes.Handle("/image", store.Config.Handler)
	routes.Handle("/moved", http.RedirectHandler("/image", http.StatusFound))
	routes.Handle("/away", http.RedirectHandler("https://byhosts.test/image", http.StatusFound))
	routes.Handle("/out", http.RedirectHandler("/other/image", http.StatusFound))
	allowed := []string{"https://byserver.test/image/", "https://byserver.test/im/"}
	routes.Handle("/im/age", store.Config.Handler)
	routes.Handle("/moved/in", http.RedirectHandler("/im/age", http.StatusFound))
	listenTLS(t, routes, "127.0.0.1:443", certificate)
	stranger, _ := certified(t, "byserver.test")
	listenTLS(t, routes, "127.0.0.1:8443", stranger)

	for _, url := range []string{"https://byserver.test/image", "https://byhosts.test/image", "https://byserver.test/moved/in"} {
		spec := store.spec(t, blockdev.VhostUser)
		spec.Hydrate, spec.Remote.URL, spec.Remote.Prefixes = true, url, allowed
		w, err := s.Serve(t.Context(), spec)
		must(t, err)
		hydrated(t, w, nil)
		must(t, w.Stop(t.Context()))
		if got, err := os.ReadFile(spec.Layers[0].Data.Name()); err != nil || !bytes.Equal(got, store.image) {
			t.Errorf("%s: the volume is not the store's image: %v", url, err)
		}
	}
	for url, why := range map[string]string{
		"https://byserver.test:8443/image": "certificate", "https://byserver.test/away": "redirects to https://byhosts.test/image, which is not below", "https://byserver.test/out": "redirects to https://byserver.test/other/image, which is not below", "https://unknown.test/image": "no such host",
	} {
		spec := store.spec(t, blockdev.VhostUser)
		spec.Hydrate, spec.Remote.URL = true, url
		w, err := s.Serve(t.Context(), spec)
		must(t, err)
		told(t, w, why)
		must(t, w.Stop(t.Context()))
	}
	// It began where nobody needs a certificate, and that store is gone.
	for _, next := range []string{"https://byserver.test/im/age", "https://byserver.test/moved/in"} {
		spec := store.spec(t, blockdev.NBD)
		spec.Hydrate, spec.Remote.URL = true, "http://byhosts.test:1/image"
		w, err := s.Serve(t.Context(), spec)
		must(t, err)
		told(t, w, "connection refused")
		if err := w.SetAddress(t.Context(), "/etc/passwd", nil); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("an address that is none: %v", err)
		}
		must(t, w.SetAddress(t.Context(), next, allowed))
		hydrated(t, w, nil)
		must(t, w.Stop(t.Context()))
		if got, err := os.ReadFile(spec.Layers[0].Data.Name()); err != nil || !bytes.Equal(got, store.image) {
			t.Errorf("moved to %s: the volume is not the store's image: %v", next, err)
		}
	}
	flat := store.spec(t, blockdev.NBD)
	flat.Remote = nil
	w, err := s.Serve(t.Context(), flat)
	must(t, err)
	if err := w.SetAddress(t.Context(), "http://byhosts.test/image", nil); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a base that is not far away: %v", err)
	}
	must(t, w.Stop(t.Context()))
}

// told waits until a worker says why its store is of no use.
func told(t *testing.T, w *control.Worker, why string) {
	t.Helper()
	for {
		st, err := w.Status(t.Context())
		must(t, err)
		if reason := st.Layers.Reason; reason != "" {
			if !strings.Contains(reason, why) {
				t.Errorf("it says %q, want %q", reason, why)
			}
			return
		}
	}
}

// ownHost gives this process, which has namespaces of its own, an /etc of these files
// and a loopback device.
func ownHost(t *testing.T, files map[string]string) {
	t.Helper()
	must(t, syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	must(t, syscall.Mount("tmpfs", "/etc", "tmpfs", 0, ""))
	must(t, os.MkdirAll("/etc/ssl/certs", 0o755))
	for path, text := range files {
		must(t, os.WriteFile(path, []byte(text), 0o600))
	}
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	must(t, err)
	defer syscall.Close(fd)
	var up struct { // struct ifreq
		name  [16]byte
		flags uint16
		_     [22]byte
	}
	copy(up.name[:], "lo")
	up.flags = syscall.IFF_UP
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&up))); errno != 0 {
		t.Fatal(errno)
	}
}

// certified makes a certificate for these names, and the authority that stands for it.
func certified(t *testing.T, names ...string) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func listenTLS(t *testing.T, h http.Handler, address string, c tls.Certificate) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	must(t, err)
	s := httptest.NewUnstartedServer(h)
	must(t, s.Listener.Close())
	s.Listener, s.TLS = l, &tls.Config{Certificates: []tls.Certificate{c}}
	s.Config.ErrorLog = nil
	s.StartTLS()
	t.Cleanup(s.Close)
}

// answerNames is a name server that knows one name, to be 127.0.0.1 (RFC 1035, section 4).
func answerNames(t *testing.T, name string) {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:53")
	must(t, err)
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 512)
		for {
			n, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			var asked string
			at := 12
			for at < n && b[at] != 0 {
				asked += string(b[at+1:at+1+int(b[at])]) + "."
				at += 1 + int(b[at])
			}
			at += 5 // its end, type and class
			kind := binary.BigEndian.Uint16(b[at-4:])
			r := append(b[:2:2], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0)
			r = append(r, b[12:at]...)
			switch {
			case asked != name:
				r[3] |= 3 // no such name
			case kind == 1:
				r[7] = 1
				r = append(r, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1)
			}
			_, _ = c.WriteTo(r, from) // who asks asks again
		}
	}()
}

package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// listeners are the places where the API is served; either may be nil.
type listeners struct {
	tcp  net.Listener // with TLS, when a certificate is configured
	unix net.Listener
}

func (l listeners) close() error {
	var errs []error
	for _, x := range []net.Listener{l.tcp, l.unix} {
		if x != nil {
			if err := x.Close(); !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// url is the base of the API at the TCP address, "" when there is none.
func (l listeners) url(c Config) string {
	if l.tcp == nil {
		return ""
	}
	scheme := "http"
	if c.TLSCert != "" {
		scheme = "https"
	}
	return scheme + "://" + l.tcp.Addr().String() + "/v0"
}

func listen(ctx context.Context, c Config) (l listeners, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	var lc net.ListenConfig
	if c.Listen != "none" {
		if l.tcp, err = lc.Listen(ctx, "tcp", c.Listen); err != nil {
			return l, err
		}
	}
	if c.TLSCert != "" && l.tcp != nil {
		cert := &certificate{cert: c.TLSCert, key: c.TLSKey}
		if _, err = cert.get(nil); err != nil {
			return l, err
		}
		l.tcp = tls.NewListener(l.tcp, &tls.Config{
			MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: cert.get,
		})
	}
	if c.Socket != "none" {
		l.unix, err = listenUnix(ctx, &lc, c.Socket)
	}
	return l, err
}

// tryListen tells before anything is begun that the API could not be served in the end.
// Nobody is kept waiting at the addresses meanwhile.
func tryListen(ctx context.Context, c Config) error {
	l, err := listen(ctx, c)
	return errors.Join(err, l.close())
}

// listenUnix makes the socket, mode 0600 from its first moment. One that a
// killed daemon left is removed.
func listenUnix(ctx context.Context, lc *net.ListenConfig, path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode()&fs.ModeSocket == 0:
		return nil, fmt.Errorf("%s is there and is not a socket", path)
	case err == nil:
		if err := left(ctx, path); err != nil {
			return nil, err
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	old := syscall.Umask(0o177)
	defer syscall.Umask(old)
	return lc.Listen(ctx, "unix", path)
}

// left is an error unless nobody listens at a socket any more.
func left(ctx context.Context, path string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return errors.Join(fmt.Errorf("another process listens at %s: %w", path, syscall.EADDRINUSE), conn.Close())
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil
	}
	return err
}

// certificate reads its files again when they were replaced, so that a
// renewal needs no restart.
type certificate struct {
	cert, key string

	mu     sync.Mutex
	loaded time.Time // modification time of what is loaded
	pair   *tls.Certificate
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	info, err := os.Stat(c.cert)
	if err == nil && c.pair != nil && info.ModTime().Equal(c.loaded) {
		return c.pair, nil
	}
	var pair tls.Certificate
	if err == nil {
		pair, err = tls.LoadX509KeyPair(c.cert, c.key)
	}
	switch {
	case err == nil:
		c.pair, c.loaded = &pair, info.ModTime()
	case c.pair == nil:
		return nil, err
	}
	return c.pair, nil // half-way through a renewal the old one still serves
}

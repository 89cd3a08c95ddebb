package gosdk

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
)

// away notes every attempt to leave this machine's loopback, which fails.
type away struct {
	mu       sync.Mutex
	attempts []string
}

var errAway = errors.New("not loopback")

func (a *away) note(what string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.attempts = append(a.attempts, what)
	return fmt.Errorf("%s: %w", what, errAway)
}

func (a *away) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(address)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return nil, a.note("a connection to " + address)
	}
	return new(net.Dialer).DialContext(ctx, network, address)
}

// resolve stands where the resolver would ask a name server.
func (a *away) resolve(context.Context, string, string) (net.Conn, error) {
	return nil, a.note("a name server")
}

// guard is put below the SDK: it clones http.DefaultTransport with its dialer.
var guard away

func TestMain(m *testing.M) {
	http.DefaultTransport.(*http.Transport).DialContext = guard.dial
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: guard.resolve}
	code := m.Run()
	if len(guard.attempts) > 0 {
		fmt.Fprintln(os.Stderr, "these attempts to leave loopback were refused:", guard.attempts)
		code = 1
	}
	os.Exit(code)
}

// TestGuard: a guard that lets things pass would show nothing.
func TestGuard(t *testing.T) {
	var a away
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DialContext = a.dial
	for _, url := range []string{"http://192.0.2.1/", "https://api.blaxel.invalid/", "http://[2001:db8::1]/"} {
		if answer, err := (&http.Client{Transport: transport}).Get(url); !errors.Is(err, errAway) {
			t.Errorf("%s: %v, %v", url, answer, err)
		}
	}
	if len(a.attempts) != 3 {
		t.Errorf("noted: %v", a.attempts)
	}
}

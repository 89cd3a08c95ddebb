package worker

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync/atomic"
)

// resolver finds the addresses of a store without the host's files, which a worker
// cannot read later: it knows the name servers and the names in /etc/hosts as they
// were when it began.
type resolver struct {
	servers []string // HOST:53
	next    atomic.Uint32
	hosts   map[string]string
	dialer  net.Dialer
}

func newResolver() (*resolver, error) {
	r := &resolver{hosts: map[string]string{}}
	for file, take := range map[string]func(fields []string){
		"/etc/resolv.conf": func(f []string) {
			if f[0] == "nameserver" {
				r.servers = append(r.servers, net.JoinHostPort(f[1], "53"))
			}
		},
		"/etc/hosts": func(f []string) {
			for _, name := range f[1:] {
				if _, known := r.hosts[name]; !known {
					r.hosts[name] = f[0]
				}
			}
		},
	} {
		text, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			line, _, _ = strings.Cut(line, "#")
			if fields := strings.Fields(line); len(fields) >= 2 {
				take(fields)
			}
		}
	}
	if len(r.servers) == 0 {
		r.servers = []string{"127.0.0.1:53"} // resolv.conf(5)
	}
	r.dialer.Resolver = &net.Resolver{PreferGo: true, Dial: r.ask}
	return r, nil
}

// dial connects to a host by its name.
func (r *resolver) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if known, ok := r.hosts[host]; ok {
		address = net.JoinHostPort(known, port)
	}
	return r.dialer.DialContext(ctx, network, address)
}

// ask connects to a name server, another one each time, so that one that is away does
// not end it.
func (r *resolver) ask(ctx context.Context, network, _ string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network, r.servers[int(r.next.Add(1)-1)%len(r.servers)])
}

package main

import (
	"errors"
	"io/fs"
	"net/url"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"holdfast/api/client"
)

const (
	defaultStateDir  = "/var/lib/holdfast"
	defaultWorkspace = "main" // over the socket, where no key says which
)

// serverFlags say which server is asked, as whom. A flag is stronger than the
// environment; among equals the URL is stronger than the socket.
type serverFlags struct {
	url, socket, stateDir, key, workspace string
	getenv                                func(string) string
}

func (s *serverFlags) register(f *pflag.FlagSet, getenv func(string) string) {
	s.getenv = getenv
	f.StringVar(&s.url, "server", "", "base URL of the API, as in http://127.0.0.1:7433/v0 (HOLDFAST_URL)")
	f.StringVar(&s.socket, "socket", "", "unix socket of a daemon on this host (HOLDFAST_SOCKET)")
	f.StringVar(&s.stateDir, "state-dir", "", "state directory of a daemon on this host, whose socket is used (default "+defaultStateDir+")")
	f.StringVar(&s.key, "key", "", "API key; better in HOLDFAST_KEY, where other users do not see it")
	f.StringVarP(&s.workspace, "workspace", "w", "", "workspace (HOLDFAST_WORKSPACE; default: the key's own, over the socket \""+defaultWorkspace+"\")")
}

func (s *serverFlags) env(names ...string) string {
	for _, n := range names {
		if v := s.getenv(n); v != "" {
			return v
		}
	}
	return ""
}

// options settles where to go, as a user of one workspace.
func (s *serverFlags) options() client.Options {
	o := s.nodeOptions()
	if o.Socket != "" && o.Workspace == "" {
		o.Workspace = defaultWorkspace
	}
	return o
}

// nodeOptions settles where to go, as one who acts on the node: no workspace
// means all that the key may see.
func (s *serverFlags) nodeOptions() client.Options {
	o := client.Options{UserAgent: "holdfast/" + version, Key: s.key, Workspace: s.workspace}
	if o.Workspace == "" {
		o.Workspace = s.env("HOLDFAST_WORKSPACE", "BL_WORKSPACE")
	}
	switch {
	case s.url != "":
		o.URL = s.url
	case s.socket != "":
		o.Socket = s.socket
	case s.stateDir != "":
		o.Socket = filepath.Join(s.stateDir, "holdfastd.sock")
	default:
		o.URL = s.env("HOLDFAST_URL", "BL_API_URL")
		if o.URL == "" {
			o.Socket = s.env("HOLDFAST_SOCKET")
		}
		if o.URL == "" && o.Socket == "" {
			o.Socket = filepath.Join(defaultStateDir, "holdfastd.sock")
		}
	}
	if o.Socket != "" {
		o.Key = "" // the socket's users are administrators
		return o
	}
	if o.Key == "" {
		o.Key = s.env("HOLDFAST_KEY", "BL_API_KEY")
	}
	if u, err := url.Parse(o.URL); err == nil && (u.Path == "" || u.Path == "/") {
		o.URL = strings.TrimSuffix(o.URL, "/") + "/v0"
	}
	return o
}

// where names the server for messages.
func (s *serverFlags) where() string {
	if o := s.options(); o.Socket != "" {
		return o.Socket
	}
	return s.options().URL
}

func (s *serverFlags) unreachableHint(err error) string {
	switch {
	case s.options().Socket == "":
		return "check --server or HOLDFAST_URL, and that holdfastd runs there"
	case errors.Is(err, fs.ErrNotExist):
		return "no daemon has its state there: start holdfastd, or say where it is with --state-dir, --socket or --server"
	case errors.Is(err, syscall.EACCES):
		return "the socket is for root; others use --server with a key"
	}
	return "is holdfastd running?"
}

// client connects to the server that flags and environment name.
func (a *app) client() (*client.Client, error) { return connect(a.server.options()) }

// nodeClient does so for commands that are about more than one workspace.
func (a *app) nodeClient() (*client.Client, error) { return connect(a.server.nodeOptions()) }

func connect(o client.Options) (*client.Client, error) {
	c, err := client.New(o)
	if err != nil {
		return nil, usageError{strings.TrimPrefix(err.Error(), "client: ")}
	}
	return c, nil
}

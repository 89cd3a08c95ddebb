package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// socketHost stands in URLs for the daemon behind a unix socket.
const socketHost = "holdfastd.invalid"

// Version is the version of the API that this package speaks.
const Version = "2026-04-28"

// Options say where the server is and who asks.
type Options struct {
	URL       string // base, with /v0: "http://127.0.0.1:7433/v0"; with Socket: ignored
	Socket    string // unix socket of a daemon on this host; needs no key
	Key       string // API key
	Workspace string // empty: the key's own
	UserAgent string // empty: "holdfast-go"
}

// Client speaks to one server.
type Client struct {
	base      *url.URL
	http      *http.Client
	key       string
	workspace string
	agent     string
}

// New makes a client; it connects when first used.
func New(o Options) (*Client, error) {
	if (o.URL == "") == (o.Socket == "") {
		return nil, errors.New("client: one of URL and Socket must be given")
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext,
		MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute, TLSHandshakeTimeout: 10 * time.Second,
	}
	raw := o.URL
	if o.Socket != "" {
		raw = "http://" + socketHost + "/v0"
		transport.Proxy = nil
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", o.Socket)
		}
	}
	base, err := url.Parse(strings.TrimSuffix(raw, "/"))
	if err != nil || base.Host == "" || (base.Scheme != "http" && base.Scheme != "https") {
		return nil, fmt.Errorf("client: %q is not an http or https URL, as http://127.0.0.1:7433/v0 is", raw)
	}
	agent := o.UserAgent
	if agent == "" {
		agent = "holdfast-go"
	}
	return &Client{base: base, http: &http.Client{Transport: transport}, key: o.Key, workspace: o.Workspace, agent: agent}, nil
}

// Close gives up idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// call is one request.
type call struct {
	method string
	path   []string // segments below the base, not escaped
	query  url.Values
	header http.Header
	body   any // nil: none; else JSON
}

// do performs r and decodes a JSON answer into out (nil: thrown away).
func (c *Client) do(ctx context.Context, r call, out any) error {
	resp, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("%s %s: answer is not the JSON expected: %w", r.method, resp.Request.URL.Path, err)
	}
	return nil
}

// send gives the answer to a request that the server accepted; an *Error else.
func (c *Client) send(ctx context.Context, r call) (*http.Response, error) {
	if slices.Contains(r.path, "") {
		return nil, errors.New("client: a name must not be empty")
	}
	var body io.Reader
	if r.body != nil {
		b, err := json.Marshal(r.body)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	u := c.base.JoinPath(escape(r.path)...)
	u.RawQuery = r.query.Encode()
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), body)
	if err != nil {
		return nil, err
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	c.identify(req)
	if r.body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return answer(c.http.Do(req))
}

func (c *Client) identify(req *http.Request) {
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Blaxel-Version", Version)
	req.Header.Set("User-Agent", c.agent)
	if c.key != "" {
		req.Header.Set("Authorization", "Bearer "+c.key)
	}
	if c.workspace != "" {
		req.Header.Set("X-Blaxel-Workspace", c.workspace)
	}
}

func escape(segments []string) []string {
	out := make([]string, len(segments))
	for i, s := range segments {
		out[i] = url.PathEscape(s)
		if s == "." || s == ".." { // else JoinPath would walk
			out[i] = strings.ReplaceAll(s, ".", "%2E")
		}
	}
	return out
}

// answer turns a refusal into an *Error.
func answer(resp *http.Response, err error) (*http.Response, error) {
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, readError(resp)
}

package oci

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"holdfast/templates/archive"
)

// Sentinels of registries. Their errors name hosts and never an address with a
// query, a header or a body: those can hold credentials.
var (
	ErrNotAllowed = errors.New("registry is not allowed")    // no operator listed it
	ErrNotFound   = errors.New("image not found")            // or not to be read with the credentials there are
	ErrRegistry   = errors.New("registry could not be used") // not reached, too slow, or answered with an error
	errForeign    = errors.New("sent us to a host that is not listed")
	errStalled    = errors.New("sent nothing for too long")
)

// RegistryOptions are an operator's words on registries.
type RegistryOptions struct {
	// Hosts are the registries that images may come from: "HOST" or "HOST:PORT",
	// asked over TLS; with "http://" before it, asked in clear.
	Hosts []string
	// Others are hosts, in the same forms, that a registry may send us to for a
	// blob or a token.
	Others []string
	// Credentials is a docker config.json with "auths"; empty: none are sent.
	Credentials string
	Stall       time.Duration // a pause after which a registry is given up; 0: 30 s
}

// Registries fetches images of the registries that are listed. It is safe for
// concurrent use.
type Registries struct {
	hosts, others map[string]bool // to whether they are asked in clear
	credentials   string
	stall         time.Duration
	transport     http.RoundTripper
}

// NewRegistries checks the options. An empty list is allowed: nothing is fetched.
func NewRegistries(o RegistryOptions) (*Registries, error) {
	r := &Registries{hosts: map[string]bool{}, others: map[string]bool{}, credentials: o.Credentials, stall: cmp.Or(o.Stall, 30*time.Second)}
	for list, into := range map[*[]string]map[string]bool{&o.Hosts: r.hosts, &o.Others: r.others} {
		for _, entry := range *list {
			host, plain := strings.CutPrefix(entry, "http://")
			if (registry.Reference{Registry: host}).ValidateRegistry() != nil || strings.ContainsAny(host, "/@ ") || host == "" {
				return nil, fmt.Errorf("%q is not HOST, HOST:PORT or http://HOST:PORT", entry)
			}
			into[registry.Reference{Registry: host}.Host()] = plain
		}
	}
	if o.Credentials != "" {
		if _, err := credentials.NewFileStore(o.Credentials); err != nil {
			return nil, fmt.Errorf("the file with credentials for registries: %w", err)
		}
		if _, err := os.Stat(o.Credentials); err != nil {
			return nil, fmt.Errorf("the file with credentials for registries: %w", err)
		}
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	r.transport = &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext, TLSHandshakeTimeout: 10 * time.Second,
		ResponseHeaderTimeout: r.stall, MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: 10 * time.Second, ForceAttemptHTTP2: true,
		DisableCompression: true, // blobs are verified as they are
	}
	return r, nil
}

// Open finds an image of a registry ("HOST[:PORT]/NAME[:TAG][@DIGEST]"; without
// tag and digest: latest) and reads its manifest and configuration. The layers
// are fetched by WriteTar. Errors: ErrInvalid, ErrNotAllowed, ErrNotFound,
// ErrRegistry, archive.ErrRefused for a bad image, the context's.
func (r *Registries) Open(ctx context.Context, reference string, o Options) (*Image, error) {
	o.Limits = o.Limits.withDefaults()
	ref, err := parseReference(reference)
	if err != nil {
		return nil, err
	}
	im := &Image{o: o}
	if im.platform, err = parsePlatform(o.Platform); err != nil {
		return nil, err
	}
	plain, listed := r.hosts[ref.Host()]
	if !listed {
		return nil, fmt.Errorf("%w: %s is not among the registries that this server may fetch from", ErrNotAllowed, archive.Quote(ref.Registry))
	}
	b := &remoteBlobs{host: ref.Registry, staging: o.Staging, places: map[string]place{}}
	if b.repository, err = r.repository(ref, plain); err != nil {
		return nil, err
	}
	im.blobs = b
	d, err := b.repository.Resolve(ctx, ref.ReferenceOrDefault())
	if err != nil {
		return nil, b.explain(ctx, "the manifest of "+ref.String(), err)
	}
	if err := im.resolve(ctx, d); err != nil {
		return nil, errors.Join(err, b.close())
	}
	return im, nil
}

func parseReference(text string) (registry.Reference, error) {
	if len(text) > 1024 {
		return registry.Reference{}, fmt.Errorf("%w: a reference of more than 1024 bytes", ErrInvalid)
	}
	ref, err := registry.ParseReference(text)
	if first, _, _ := strings.Cut(text, "/"); err != nil || !strings.ContainsAny(first, ".:") && first != "localhost" {
		return registry.Reference{}, fmt.Errorf("%w: %s is not a reference: HOST[:PORT]/NAME[:TAG][@DIGEST], with the registry's host first", ErrInvalid, archive.Quote(text))
	}
	return ref, nil
}

func (r *Registries) repository(ref registry.Reference, plain bool) (*remote.Repository, error) {
	guard := &guard{to: r.transport, stall: r.stall, host: ref.Host(), plain: plain, others: r.others}
	client := &auth.Client{
		Client: &http.Client{Transport: guard}, Cache: auth.NewCache(),
		// The guard lets through hosts that the operator listed and no other,
		// wherever they are.
		BlockedRealmPrefixes: []netip.Prefix{},
	}
	client.SetUserAgent("holdfast")
	if r.credentials != "" {
		store, err := credentials.NewFileStore(r.credentials) // again: they are renewed under us
		if err != nil {
			return nil, fmt.Errorf("%w: the file with credentials cannot be read", ErrRegistry)
		}
		client.Credential = credentials.Credential(store)
	}
	return &remote.Repository{Client: client, Reference: ref, PlainHTTP: plain, MaxMetadataBytes: maxDocument}, nil
}

// guard is the one way out: it refuses hosts that nobody listed, for whatever
// reason they are asked, and gives up those that stall.
type guard struct {
	to     http.RoundTripper
	stall  time.Duration
	host   string
	plain  bool
	others map[string]bool
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	plain, listed := g.others[req.URL.Host]
	if req.URL.Host == g.host {
		plain, listed = g.plain, true
	}
	if !listed || req.URL.Scheme != "https" && (req.URL.Scheme != "http" || !plain) {
		return nil, fmt.Errorf("%w (%s://%s)", errForeign, clip(req.URL.Scheme), clip(req.URL.Host))
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(g.stall, func() { cancel(errStalled) })
	resp, err := g.to.RoundTrip(req.WithContext(ctx))
	if err != nil {
		timer.Stop()
		if cause := context.Cause(ctx); errors.Is(cause, errStalled) {
			err = cause
		}
		cancel(nil)
		return nil, err
	}
	timer.Stop() // it runs again while the body is read
	resp.Body = &watched{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, timer: timer, stall: g.stall}
	return resp, nil
}

func clip(s string) string { return s[:min(len(s), 120)] }

// watched is a body that may pause, but not for long.
type watched struct {
	io.ReadCloser
	ctx    context.Context //nolint:containedctx // of the one request
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
}

func (w *watched) Read(p []byte) (int, error) {
	w.timer.Reset(w.stall) // our own pauses do not count
	n, err := w.ReadCloser.Read(p)
	w.timer.Stop()
	if cause := context.Cause(w.ctx); err != nil && errors.Is(cause, errStalled) {
		err = cause
	}
	return n, err
}

func (w *watched) Close() error {
	w.timer.Stop()
	err := w.ReadCloser.Close()
	w.cancel(nil)
	return err
}

// remoteBlobs are an image's blobs in a registry. Layers are read twice and so
// fetched into a file in staging first.
type remoteBlobs struct {
	repository *remote.Repository
	host       string
	staging    string
	file       *os.File
	places     map[string]place // of what was fetched, by digest
}

func (b *remoteBlobs) open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	if p, ok := b.places[string(d.Digest)]; ok {
		return io.NopCloser(io.NewSectionReader(b.file, p.offset, p.size)), nil
	}
	r, err := b.repository.Fetch(ctx, d)
	if err != nil {
		return nil, b.explain(ctx, string(d.Digest), err)
	}
	return &remoteBlob{ReadCloser: r, blobs: b, ctx: ctx, what: string(d.Digest)}, nil
}

// remoteBlob says whose fault an error is while it is read.
type remoteBlob struct {
	io.ReadCloser
	blobs *remoteBlobs
	ctx   context.Context //nolint:containedctx // of the one fetch
	what  string
}

func (r *remoteBlob) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = r.blobs.explain(r.ctx, r.what, err)
	}
	return n, err
}

func (b *remoteBlobs) prepare(ctx context.Context, layers []layer) (err error) {
	if b.file == nil {
		if b.file, err = unnamed(b.staging); err != nil {
			return err
		}
	}
	end := int64(0)
	for _, p := range b.places {
		end = max(end, p.offset+p.size)
	}
	for _, l := range layers {
		if _, done := b.places[string(l.desc.Digest)]; done {
			continue
		}
		if err := b.fetch(ctx, l, end); err != nil {
			return err
		}
		b.places[string(l.desc.Digest)] = place{offset: end, size: l.size}
		end += l.size
	}
	return nil
}

func (b *remoteBlobs) fetch(ctx context.Context, l layer, at int64) error {
	r, err := b.open(ctx, l.desc)
	if err != nil {
		return fmt.Errorf("layer %s: %w", archive.Quote(l.what), err)
	}
	defer r.Close()
	w := bufio.NewWriterSize(io.NewOffsetWriter(b.file, at), 1<<20)
	in := content.NewVerifyReader(r, l.desc)
	if _, err := io.Copy(w, in); err != nil {
		return blobError("layer "+archive.Quote(l.what), err)
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	if err := in.Verify(); err != nil {
		return blobError("layer "+archive.Quote(l.what), err)
	}
	return nil
}

func (b *remoteBlobs) close() error {
	if b.file == nil {
		return nil
	}
	return b.file.Close()
}

// explain gives an error of a registry one of our names. The library's own text
// is left out where it can hold an address with its query.
func (b *remoteBlobs) explain(ctx context.Context, what string, err error) error {
	var response *errcode.ErrorResponse
	var network net.Error
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, errStalled):
		return fmt.Errorf("%w: %s %w", ErrRegistry, b.host, errStalled)
	case errors.Is(err, errForeign):
		return fmt.Errorf("%w: %s %w", ErrRegistry, b.host, foreign(err))
	case errors.Is(err, errdef.ErrNotFound):
		return fmt.Errorf("%w: %s has no %s", ErrNotFound, b.host, what)
	case errors.As(err, &response) && (response.StatusCode == http.StatusUnauthorized || response.StatusCode == http.StatusForbidden):
		return fmt.Errorf("%w: %s does not let us read %s", ErrNotFound, b.host, what)
	case errors.As(err, &response) && response.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%w: %s has no %s", ErrNotFound, b.host, what)
	case errors.As(err, &response):
		return fmt.Errorf("%w: %s answered %d for %s", ErrRegistry, b.host, response.StatusCode, what)
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		return fmt.Errorf("%w: %s wants credentials, and has none from us", ErrNotFound, b.host)
	case errors.As(err, &network) && network.Timeout():
		return fmt.Errorf("%w: %s took too long", ErrRegistry, b.host)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: %s broke off %s", ErrRegistry, b.host, what)
	case errors.As(err, &network):
		return fmt.Errorf("%w: %s cannot be reached", ErrRegistry, b.host)
	}
	return fmt.Errorf("%w: %s: %s is not what it should be", ErrRegistry, b.host, what)
}

// foreign is the innermost error about a host that is not listed, without the
// address that led there.
func foreign(err error) error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if strings.HasPrefix(e.Error(), errForeign.Error()) {
			return e
		}
	}
	return errForeign
}

package remote

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"holdfast/blockdev/serve/overlay"
)

// Sentinels of stores.
var (
	ErrNotAllowed = errors.New("store is not allowed")    // no operator listed it
	ErrInvalidURL = errors.New("URL cannot be used")      // whatever is there
	ErrStore      = errors.New("store could not be used") // not reached, too slow, or not what it should send
)

// getTime bounds one small file or one range.
const getTime = 2 * time.Minute

// Stores are those that an operator lets the server fetch from. It is safe for
// concurrent use.
type Stores struct {
	prefixes overlay.Prefixes
	client   *http.Client
}

// NewStores takes the prefixes of URLs that may be fetched: "https://HOST/PATH/" or
// "http://HOST/PATH/". None: nothing may. Redirects are followed below them, too, and
// nowhere else.
func NewStores(prefixes []string) (*Stores, error) {
	p, err := overlay.ParsePrefixes(prefixes)
	if err != nil {
		return nil, err
	}
	return &Stores{prefixes: p, client: overlay.StoreClient(nil, nil, p.Allow)}, nil
}

// Check says whether a URL may be fetched. ErrInvalidURL, ErrNotAllowed.
func (s *Stores) Check(text string) error {
	_, err := s.allowed(text)
	return err
}

func (s *Stores) allowed(text string) (*url.URL, error) {
	u, err := overlay.PlainURL(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidURL, err)
	}
	if s.prefixes.Empty() {
		return nil, fmt.Errorf("%w: this server uses none: its operator lists the prefixes of URLs with the setting remote_templates", ErrNotAllowed)
	}
	if !s.prefixes.Allow(u) {
		return nil, fmt.Errorf("%w: %s://%s is not below a prefix of the setting remote_templates", ErrNotAllowed, u.Scheme, u.Host)
	}
	return u, nil
}

// Published is a revision that was found in a store.
type Published struct {
	Manifest
	ManifestURL, ManifestDigest string
	ImageURL, ChunksURL         string
}

// Find fetches a manifest and holds it against its digest. ErrInvalidURL,
// ErrNotAllowed, ErrStore, ErrManifest, the context's errors.
func (s *Stores) Find(ctx context.Context, manifestURL, digest string) (Published, error) {
	want, err := ParseDigest(digest)
	if err != nil {
		return Published{}, cmp.Or(s.Check(manifestURL), fmt.Errorf("%w: %w", ErrManifest, err))
	}
	return s.find(ctx, manifestURL, &want)
}

// FindBytes fetches a manifest of which nothing is known but the digest of the chunks:
// one of other bytes is ErrStore. Else as Find.
func (s *Stores) FindBytes(ctx context.Context, manifestURL string, chunks [sha256.Size]byte) (Published, error) {
	p, err := s.find(ctx, manifestURL, nil)
	if err != nil {
		return p, err
	}
	if got, err := ParseDigest(p.ChunksDigest); err != nil || got != chunks {
		return p, fmt.Errorf("%w: %s is of other bytes: its chunks are %s, not %s", ErrStore, manifestURL, p.ChunksDigest, FormatDigest(chunks))
	}
	return p, nil
}

// find fetches a manifest; with want nil, whatever it is.
func (s *Stores) find(ctx context.Context, manifestURL string, want *[sha256.Size]byte) (Published, error) {
	p := Published{ManifestURL: manifestURL}
	u, err := s.allowed(manifestURL)
	if err != nil {
		return p, err
	}
	var b strings.Builder
	got, err := s.get(ctx, manifestURL, want, MaxManifest, &b)
	if err != nil {
		return p, err
	}
	p.ManifestDigest = FormatDigest(got)
	if p.Manifest, err = DecodeManifest([]byte(b.String())); err != nil {
		return p, err
	}
	beside := func(name string) string {
		to := *u
		to.Path = path.Dir(u.Path) + "/" + name
		if path.Dir(u.Path) == "/" {
			to.Path = "/" + name
		}
		return to.String()
	}
	p.ImageURL, p.ChunksURL = beside(p.Image), beside(p.Manifest.Chunks)
	return p, nil
}

// FetchChunks writes a revision's file of chunks to w, verified: what w has after an
// error is nothing.
func (s *Stores) FetchChunks(ctx context.Context, p Published, w io.Writer) error {
	want, err := ParseDigest(p.ChunksDigest)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrManifest, err)
	}
	_, err = s.get(ctx, p.ChunksURL, &want, MaxChunks, w)
	return err
}

// get copies a whole file, of at most so many bytes, tells its digest and, unless want is
// nil, verifies it.
func (s *Stores) get(ctx context.Context, from string, want *[sha256.Size]byte, most int64, w io.Writer) (digest [sha256.Size]byte, err error) {
	if _, err := s.allowed(from); err != nil {
		return digest, err
	}
	bounded, cancel := context.WithTimeout(ctx, getTime)
	defer cancel()
	request, err := http.NewRequestWithContext(bounded, http.MethodGet, from, nil)
	if err != nil {
		return digest, fmt.Errorf("%w: %w", ErrInvalidURL, err)
	}
	response, err := s.client.Do(request)
	if err != nil {
		return digest, failed(ctx, from, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return digest, fmt.Errorf("%w: %s: status %d", ErrStore, from, response.StatusCode)
	}
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, sum), io.LimitReader(response.Body, most+1))
	digest = [sha256.Size]byte(sum.Sum(nil))
	switch {
	case err != nil:
		return digest, failed(ctx, from, err)
	case n > most:
		return digest, fmt.Errorf("%w: %s has more than %d bytes", ErrStore, from, most)
	case want != nil && digest != *want:
		return digest, fmt.Errorf("%w: %s is not what it should be: its SHA-256 is %s", ErrStore, from, FormatDigest(digest))
	}
	return digest, nil
}

func failed(ctx context.Context, from string, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) { // the store's time is over, not the caller's
		return fmt.Errorf("%w: %s: %s", ErrStore, from, err.Error())
	}
	return fmt.Errorf("%w: %s: %w", ErrStore, from, err)
}

// Open gives the bytes of a revision's image until the context ends: verified, and
// tried a few times. Fetch errors are ErrStore. chunks is its file of chunks.
func (s *Stores) Open(ctx context.Context, p Published, chunks io.ReaderAt) (io.ReaderAt, error) {
	if _, err := s.allowed(p.ImageURL); err != nil {
		return nil, err
	}
	c, err := overlay.ReadChunks(chunks)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrManifest, p.ChunksURL, err)
	}
	if c.Size != p.Size {
		return nil, fmt.Errorf("%w: its image has %d bytes, its chunks are of %d", ErrManifest, p.Size, c.Size)
	}
	return &image{ctx: ctx, from: p.ImageURL, fetch: overlay.HTTPFetch(s.client, p.ImageURL), c: c}, nil
}

// image reads single chunks; nothing is kept.
type image struct {
	ctx   context.Context //nolint:containedctx // io.ReaderAt has none
	from  string
	fetch overlay.Fetch
	c     overlay.Chunks
}

func (m *image) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) && off < m.c.Size {
		i := off / m.c.Chunk
		b, err := m.chunk(i)
		if err != nil {
			return n, err
		}
		k := copy(p[n:], b[off-i*m.c.Chunk:])
		n, off = n+k, off+int64(k)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *image) chunk(i int64) ([]byte, error) {
	b := make([]byte, min(m.c.Chunk, m.c.Size-i*m.c.Chunk))
	var want [sha256.Size]byte
	if _, err := m.c.Digests.ReadAt(want[:], i*sha256.Size); err != nil {
		return nil, err
	}
	if want == [sha256.Size]byte{} {
		return b, nil
	}
	ctx, cancel := context.WithTimeout(m.ctx, getTime)
	defer cancel()
	if err := m.fetch(ctx, b, i*m.c.Chunk); err != nil {
		return nil, failed(m.ctx, m.from, err)
	}
	if sha256.Sum256(b) != want {
		return nil, fmt.Errorf("%w: %s: chunk %d is not what was published", ErrStore, m.from, i)
	}
	return b, nil
}

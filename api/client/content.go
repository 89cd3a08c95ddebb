package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

// DiffEntry is a name that is not the same in two versions of a template.
type DiffEntry struct {
	Path    string    `json:"path"`
	Bytes   []byte    `json:"pathBytes,omitempty"` // the path as it is, where it is not UTF-8
	Action  string    `json:"action"`              // added, removed, changed
	Changed []string  `json:"changed,omitempty"`   // kind, contents, target, mode, owner, mtime, xattrs, links
	Before  *DiffFile `json:"before,omitempty"`
	After   *DiffFile `json:"after,omitempty"`
}

// DiffFile is what a name was or is.
type DiffFile struct {
	Type    string    `json:"type"`
	Mode    string    `json:"mode"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	Size    int64     `json:"size"`
	ModTime time.Time `json:"modTime"`
	Target  string    `json:"target,omitempty"`
}

// DiffTemplate compares two versions and calls each with every name that is not
// the same, as they come, until it returns an error, which DiffTemplate returns.
// to empty: the newest.
func (c *Client) DiffTemplate(ctx context.Context, name, from, to string, each func(DiffEntry) error) error {
	q := url.Values{"from": {from}}
	if to != "" {
		q.Set("to", to)
	}
	resp, err := c.send(ctx, call{method: "GET", path: []string{"volume_templates", name, "diff"}, query: q})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := decodeDiff(bufio.NewReader(resp.Body), each); err != nil {
		return fmt.Errorf("the comparison is not whole: %w", err)
	}
	return nil
}

// decodeDiff reads {"from":…,"to":…,"entries":[…],…} without keeping the entries.
func decodeDiff(r io.Reader, each func(DiffEntry) error) error {
	in := json.NewDecoder(r)
	if err := expect(in, json.Delim('{')); err != nil {
		return err
	}
	for in.More() {
		key, err := in.Token()
		if err != nil {
			return err
		}
		if key != "entries" {
			var other json.RawMessage
			if err := in.Decode(&other); err != nil {
				return err
			}
			continue
		}
		if err := expect(in, json.Delim('[')); err != nil {
			return err
		}
		for in.More() {
			var e DiffEntry
			if err := in.Decode(&e); err != nil {
				return err
			}
			if err := each(e); err != nil {
				return err
			}
		}
		if err := expect(in, json.Delim(']')); err != nil {
			return err
		}
	}
	return expect(in, json.Delim('}'))
}

func expect(in *json.Decoder, want json.Delim) error {
	got, err := in.Token()
	if err == nil && got != want {
		err = fmt.Errorf("%v where %v belongs", got, want)
	}
	return err
}

// Archive is a version's contents as a plain tar, while it comes.
type Archive struct {
	io.ReadCloser
	Version string
	Length  int64 // bytes
}

// PullTemplate gives the contents of a version (empty: the newest) as a tar. The
// caller closes it. An early end is io.ErrUnexpectedEOF.
func (c *Client) PullTemplate(ctx context.Context, name, version string) (*Archive, error) {
	q := url.Values{}
	if version != "" {
		q.Set("version", version)
	}
	resp, err := c.send(ctx, call{method: "GET", path: []string{"volume_templates", name, "archive"}, query: q}) //nolint:bodyclose // the caller closes the Archive
	if err != nil {
		return nil, err
	}
	return &Archive{resp.Body, resp.Header.Get("X-Holdfast-Version"), resp.ContentLength}, nil
}

// Delta makes what is sent instead of a whole archive when the server has parts of
// it; package holdfast/templates/delta says how.
type Delta interface {
	// Query asks what the server has. ErrWhole when it cannot be sent in parts.
	Query(ctx context.Context) ([]byte, error)
	// Body gives what it lacks after its answer, with the exact length in bytes.
	Body(ctx context.Context, same bool, known []byte) (io.ReadCloser, int64, error)
}

// deltaAttempts is how often a delta is tried: versions can go in between.
const deltaAttempts = 2

// ErrWhole means that the whole archive is to be sent: because the server has
// nothing of it, or as a Delta's answer.
var ErrWhole = errors.New("there is nothing to leave out")

// pushDelta sends what the server lacks. ErrWhole when there is nothing that it
// has, when it does not know how, or when it does not work out: the upload URL is
// as it was then.
func (c *Client) pushDelta(ctx context.Context, upload string, p Push) error {
	query, err := p.Delta.Query(ctx)
	if err != nil {
		return err
	}
	for range deltaAttempts {
		var known struct {
			Same  bool   `json:"same"`
			Known []byte `json:"known"`
		}
		answer, err := c.uploadPart(ctx, http.MethodPost, upload, "known", bytes.NewReader(query), int64(len(query)))
		if err == nil {
			err = json.Unmarshal(answer, &known)
		}
		if err != nil {
			return wholeInstead(err)
		}
		if !known.Same && len(bytes.Trim(known.Known, "\x00")) == 0 {
			return ErrWhole
		}
		body, length, err := p.Delta.Body(ctx, known.Same, known.Known)
		if err != nil {
			return err
		}
		_, err = c.uploadPart(ctx, http.MethodPut, upload, "delta", &counter{r: body, each: p.sent(length)}, length)
		if closed := body.Close(); err == nil {
			err = closed
		}
		var refused *Error
		if errors.As(err, &refused) && refused.Code == "CHUNKS_MISSING" {
			continue
		}
		return wholeInstead(err)
	}
	return ErrWhole
}

// sent reports progress in bytes of the whole archive, of which length is sent.
func (p Push) sent(length int64) func(int64) {
	if p.Progress == nil {
		return nil
	}
	return func(n int64) { p.Progress(p.Length - length + n) }
}

// wholeInstead tells refusals of a delta, after which the archive can be sent
// instead, from those of what it holds.
func wholeInstead(err error) error {
	var refused *Error
	if errors.As(err, &refused) && refused.Code != "ARCHIVE_REFUSED" && (refused.Status < 500 && refused.Status != http.StatusForbidden) {
		return fmt.Errorf("%w: %w", ErrWhole, err)
	}
	return err
}

// uploadPart asks a path below an upload URL. The URL carries its own authority.
func (c *Client) uploadPart(ctx context.Context, method, upload, part string, body io.Reader, length int64) ([]byte, error) {
	u, err := c.uploadURL(upload)
	if err != nil {
		return nil, err
	}
	u = withPath(u, part)
	req, err := http.NewRequestWithContext(ctx, method, u.String(), io.NopCloser(body))
	if err != nil {
		return nil, err
	}
	req.ContentLength = length
	req.Header.Set("Content-Type", "application/octet-stream")
	req.Header.Set("User-Agent", c.agent)
	resp, err := answer(c.http.Do(req))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
}

// maxAnswer bounds what is read of an answer to a part.
const maxAnswer = 64 << 20

func withPath(u *url.URL, part string) *url.URL {
	below := *u
	below.Path += "/" + part
	below.RawPath = ""
	return &below
}

func (c *Client) uploadURL(to string) (*url.URL, error) {
	u, err := url.Parse(to)
	if err != nil {
		return nil, fmt.Errorf("upload URL: %w", err)
	}
	if c.base.Host == socketHost {
		u.Scheme, u.Host = c.base.Scheme, c.base.Host
	}
	return u, nil
}

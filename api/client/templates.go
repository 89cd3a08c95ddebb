package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// Template is a named line of versions.
type Template struct {
	Metadata VolumeMetadata    `json:"metadata"`
	Spec     TemplateSpec      `json:"spec"`
	State    TemplateState     `json:"state,omitzero"`
	Versions []TemplateVersion `json:"versions,omitempty"`
}

// TemplateSpec is what its owner set.
type TemplateSpec struct {
	DefaultSize int64      `json:"defaultSize,omitempty"` // MiB
	Description string     `json:"description,omitempty"`
	Retention   *Retention `json:"retention,omitempty"`
}

// TemplateState sums up the versions.
type TemplateState struct {
	Status                string    `json:"status,omitempty"` // created, ready, error
	LatestVersion         string    `json:"latestVersion,omitempty"`
	VersionCount          int       `json:"versionCount,omitempty"`
	LastVersionUploadedAt time.Time `json:"lastVersionUploadedAt,omitzero"`
}

// TemplateVersion is one immutable version.
type TemplateVersion struct {
	Name         string      `json:"name"`
	TemplateName string      `json:"templateName,omitempty"`
	Status       string      `json:"status"` // CREATED, READY, FAILED
	VersionID    string      `json:"versionId,omitempty"`
	ContentSize  int64       `json:"contentSize,omitempty"` // bytes
	Workspace    string      `json:"workspace,omitempty"`
	Failure      string      `json:"failure,omitempty"`
	Digest       string      `json:"digest,omitempty"`
	Number       int         `json:"number,omitempty"`
	CreatedAt    time.Time   `json:"createdAt,omitzero"`
	CreatedBy    string      `json:"createdBy,omitempty"`
	ReadyAt      time.Time   `json:"readyAt,omitzero"`
	VerifiedAt   time.Time   `json:"verifiedAt,omitzero"`
	RollbackOf   int         `json:"rollbackOf,omitempty"`
	Pinned       *VersionPin `json:"pinned,omitempty"`
	Damaged      bool        `json:"damaged,omitempty"`
	Remote       *Remote     `json:"remote,omitempty"` // nil: its bytes are in the pool
}

// Remote is where the bytes of a version are that stay far away.
type Remote struct {
	Host       string `json:"host"`
	Filesystem string `json:"filesystem"`
	Size       int64  `json:"size"` // MiB: of the smallest volume
}

// Templates lists the templates of the workspace.
func (c *Client) Templates(ctx context.Context) ([]Template, error) {
	var out []Template
	err := c.do(ctx, call{method: "GET", path: []string{"volume_templates"}}, &out)
	return out, err
}

// Template finds one by name.
func (c *Client) Template(ctx context.Context, name string) (Template, error) {
	var out Template
	err := c.do(ctx, call{method: "GET", path: []string{"volume_templates", name}}, &out)
	return out, err
}

// DeleteTemplate removes a template and its versions; volumes made of it stay.
func (c *Client) DeleteTemplate(ctx context.Context, name string) (Template, error) {
	var out Template
	err := c.do(ctx, call{method: "DELETE", path: []string{"volume_templates", name}}, &out)
	return out, err
}

// DeleteTemplateVersion removes one version; the only one cannot be removed.
func (c *Client) DeleteTemplateVersion(ctx context.Context, name, version string) (Template, error) {
	var out struct {
		Template Template `json:"template"`
	}
	err := c.do(ctx, call{method: "DELETE", path: []string{"volume_templates", name, "versions", version}}, &out)
	return out.Template, err
}

// Push is the upload of a new version of a template.
type Push struct {
	Name        string
	Version     string // empty: its number
	DefaultSize int64  // MiB; 0: kept
	Description string // empty: kept
	Format      string // how Archive is packed: tar, tar.gz, tar.zst, zip, oci; empty: the server looks
	Archive     io.Reader
	Length      int64             // bytes of Archive, exactly
	Progress    func(bytes int64) // called as bytes are sent; may be nil
	Delta       Delta             // what can be sent instead of Archive; nil: nothing
}

// PushTemplate makes the template if it is not there, uploads the archive and
// returns when the version is usable and durable.
func (c *Client) PushTemplate(ctx context.Context, p Push) (Template, error) {
	upload, parts, err := c.beginUpload(ctx, p)
	if err != nil {
		return Template{}, err
	}
	err = ErrWhole
	if parts && p.Delta != nil {
		err = c.pushDelta(ctx, upload, p)
	}
	if errors.Is(err, ErrWhole) {
		err = c.upload(ctx, upload, p)
	}
	if err != nil {
		return Template{}, err
	}
	return c.Template(ctx, p.Name)
}

// beginUpload gives the upload URL, and whether it takes parts of a tree and there
// is a version that may have some.
func (c *Client) beginUpload(ctx context.Context, p Push) (upload string, parts bool, err error) {
	q := url.Values{"upload": {"true"}}
	if p.Version != "" {
		q.Set("version", p.Version)
	}
	body := Template{Metadata: VolumeMetadata{Name: p.Name}, Spec: TemplateSpec{DefaultSize: p.DefaultSize, Description: p.Description}}
	resp, err := c.send(ctx, call{method: "PUT", path: []string{"volume_templates", p.Name}, query: q, body: body})
	if err != nil {
		return "", false, err
	}
	defer resp.Body.Close()
	if upload = resp.Header.Get("X-Blaxel-Upload-Url"); upload == "" {
		return "", false, errors.New("the server gave no upload URL")
	}
	if resp.Header.Get("X-Holdfast-Upload-Delta") != "1" {
		return upload, false, nil
	}
	var t Template
	if err := json.NewDecoder(resp.Body).Decode(&t); err != nil {
		return "", false, fmt.Errorf("PUT %s: answer is not the JSON expected: %w", resp.Request.URL.Path, err)
	}
	return upload, slices.ContainsFunc(t.Versions, func(v TemplateVersion) bool { return v.Status == "READY" }), nil
}

// upload puts the archive where the server said. Over the unix socket only
// the URL's path counts. The URL carries its own authority: no key is sent.
func (c *Client) upload(ctx context.Context, to string, p Push) error {
	u, err := c.uploadURL(to)
	if err != nil {
		return err
	}
	if p.Format != "" {
		q := u.Query()
		q.Set("format", p.Format)
		u.RawQuery = q.Encode()
	}
	body := io.Reader(&counter{r: p.Archive, each: p.Progress})
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, u.String(), io.NopCloser(body))
	if err != nil {
		return err
	}
	req.ContentLength = p.Length
	req.Header.Set("Content-Type", "application/x-tar")
	req.Header.Set("User-Agent", c.agent)
	resp, err := answer(c.http.Do(req))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// Import makes a version of a template of a container image.
type Import struct {
	Image    string `json:"image"`              // HOST[:PORT]/NAME[:TAG][@DIGEST]
	Platform string `json:"platform,omitempty"` // OS/ARCH[/VARIANT]; empty: linux on the server's architecture
	Version  string `json:"version,omitempty"`  // empty: its number
}

// ImportTemplate lets the server fetch an image and make a version of the template
// of it; the template is made if it is not there. It returns when the version is
// usable and durable.
func (c *Client) ImportTemplate(ctx context.Context, name string, i Import) (TemplateVersion, error) {
	var out TemplateVersion
	err := c.do(ctx, call{method: "POST", path: []string{"volume_templates", name, "import"}, body: i}, &out)
	return out, err
}

// Registration is a published version that is to be one of a template here.
type Registration struct {
	Manifest string `json:"manifest"`          // URL
	Digest   string `json:"digest"`            // SHA-256 of the manifest
	Version  string `json:"version,omitempty"` // empty: its number
}

// RegisterTemplate makes a version whose bytes stay where they were published; the
// template is made if it is not there. It needs a control-plane key. It returns when
// the version is usable and durable.
func (c *Client) RegisterTemplate(ctx context.Context, name string, r Registration) (TemplateVersion, error) {
	var out TemplateVersion
	err := c.do(ctx, call{method: "POST", path: []string{"volume_templates", name, "remote"}, body: r}, &out)
	return out, err
}

// RelocateVersion says at which URL the manifest of a remote version is by now: what is
// not here of it, in volumes and snapshots too, is fetched from there. It needs a
// control-plane key.
func (c *Client) RelocateVersion(ctx context.Context, name, version, manifest string) (TemplateVersion, error) {
	var out TemplateVersion
	body := struct {
		Manifest string `json:"manifest"`
	}{manifest}
	err := c.do(ctx, call{method: "PUT", path: []string{"volume_templates", name, "versions", version, "remote"}, body: body}, &out)
	return out, err
}

// RelocateVolume says at which URL a manifest is by now of what a volume was made of, when
// that version was deleted: all volumes and snapshots of it follow. It needs a
// control-plane key.
func (c *Client) RelocateVolume(ctx context.Context, name, manifest string) (Volume, error) {
	var out Volume
	body := struct {
		Manifest string `json:"manifest"`
	}{manifest}
	err := c.do(ctx, call{method: "PUT", path: []string{"volumes", name, "remote"}, body: body}, &out)
	return out, err
}

// Publication asks for the image of a version.
type Publication struct {
	Version    string // empty: the newest
	Filesystem string // empty: ext4
	Size       int64  // MiB; 0: the template's default
}

// TemplateImage gives the sized image of a version as package templates/remote sends
// it. The caller closes it.
func (c *Client) TemplateImage(ctx context.Context, name string, p Publication) (io.ReadCloser, error) {
	q := url.Values{}
	for key, value := range map[string]string{"version": p.Version, "filesystem": p.Filesystem} {
		if value != "" {
			q.Set(key, value)
		}
	}
	if p.Size > 0 {
		q.Set("size", strconv.FormatInt(p.Size, 10))
	}
	resp, err := c.send(ctx, call{method: "GET", path: []string{"volume_templates", name, "image"}, query: q})
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// counter reports how far its reader was read.
type counter struct {
	r    io.Reader
	n    int64
	each func(int64)
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.each != nil && n > 0 {
		c.each(c.n)
	}
	return n, err
}

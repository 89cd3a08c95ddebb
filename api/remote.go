package api

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/url"

	"holdfast/blockdev/filesystem"
	"holdfast/templates"
)

// RemoteVersion says where the bytes of a version are that are not in the pool.
type RemoteVersion struct {
	Host       string `json:"host"` // of the store, with its port; the rest is the operator's
	Filesystem string `json:"filesystem"`
	Size       int64  `json:"size"` // MiB, of the image: the smallest volume
}

func remoteBody(r templates.Revision) *RemoteVersion {
	if r.Remote == nil {
		return nil
	}
	b := &RemoteVersion{Filesystem: string(r.Remote.Filesystem), Size: r.ImageBytes >> 20}
	if u, err := url.Parse(r.Remote.Image); err == nil {
		b.Host = u.Host
	}
	return b
}

// templateImage sends the sized image of a version, for `holdfast template publish`.
func templateImage(c *call) error {
	name, err := c.pathName("volume template")
	if err != nil {
		return err
	}
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return invalid("query", "is not well-formed")
	}
	p := templates.Publication{Version: query.Get("version"), Filesystem: filesystem.Type(query.Get("filesystem"))}
	size, err := mebibytes("size", []byte(query.Get("size")))
	if err != nil {
		return err
	}
	if size != nil {
		p.SizeMiB = *size
	}
	if err := c.place(c.s.images, "images that are published"); err != nil {
		return err
	}
	defer func() { <-c.s.images }()
	var out *bufio.Writer
	err = c.s.o.Library.Publish(c.r.Context(), c.workspace, name, p, func(v templates.Revision) io.Writer {
		h := c.w.Header()
		h.Set("Content-Type", "application/octet-stream")
		h.Set(versionHeader, v.Name)
		c.w.WriteHeader(http.StatusOK)
		out = bufio.NewWriterSize(patientWriter{c}, 256<<10)
		return out
	})
	if err != nil {
		return err
	}
	return out.Flush()
}

// RemoteRequest is the body of the registration of a published version.
type RemoteRequest struct {
	Manifest *string `json:"manifest"` // URL
	Digest   *string `json:"digest"`   // SHA-256 of the manifest
	Version  *string `json:"version"`  // name of the version; absent: its number
}

// registerRemote makes a version whose bytes stay in a store. It answers when the
// version is READY.
func registerRemote(c *call) error {
	var b RemoteRequest
	check := func() error {
		switch {
		case value(b.Manifest) == "":
			return invalid("manifest", "is required: the URL of the manifest that `holdfast template publish` wrote")
		case value(b.Digest) == "":
			return invalid("digest", "is required: the SHA-256 of the manifest, which `holdfast template publish` printed")
		}
		return nil
	}
	return c.fetchVersion(&b, check, func(ctx context.Context, template string) (templates.Revision, error) {
		return c.s.o.Library.Register(ctx, c.workspace, templates.Registration{
			Template: template, Version: value(b.Version), Manifest: *b.Manifest, Digest: *b.Digest, Actor: c.principal.actor(),
		})
	})
}

// RelocationRequest is the body that says where a remote version is by now.
type RelocationRequest struct {
	Manifest *string `json:"manifest"` // URL
}

func (b *RelocationRequest) check() error {
	if value(b.Manifest) == "" {
		return invalid("manifest", "is required: the URL at which the manifest of the version is by now")
	}
	return nil
}

// relocateVolume has what is not here of a volume, whose version was deleted, be fetched
// from elsewhere, and of all others that were made of that version.
func relocateVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	var b RelocationRequest
	err = c.fetching(&b, b.check, func(ctx context.Context) error {
		v, err := c.s.o.Engine.Volume(c.workspace, name)
		if err != nil {
			return err
		}
		return c.s.o.Library.RelocateImage(ctx, v.ID, *b.Manifest)
	})
	if err != nil {
		return err
	}
	v, err := c.s.o.Engine.Volume(c.workspace, name)
	if err != nil {
		return err
	}
	c.extendWrite()
	return c.volume(v)
}

// relocateRemote has what is not here of a remote version be fetched from elsewhere.
func relocateRemote(c *call) error {
	_, version, err := c.pathVersion()
	if err != nil {
		return err
	}
	var b RelocationRequest
	return c.fetchVersion(&b, b.check, func(ctx context.Context, template string) (templates.Revision, error) {
		return c.s.o.Library.Relocate(ctx, c.workspace, templates.Relocation{
			Template: template, Version: version, Manifest: *b.Manifest, Actor: c.principal.actor(),
		})
	})
}

package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	_ "crypto/sha256" // the digests that blobs may have
	_ "crypto/sha512"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"

	"holdfast/templates/archive"
	"holdfast/templates/format"
)

// blobs is where an image's blobs are. What open gives is not verified, and may
// be longer or shorter than the descriptor says.
type blobs interface {
	// prepare fetches what open will be asked for twice.
	prepare(ctx context.Context, layers []layer) error
	open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)
	close() error
}

// The media types of Docker's schema 2, which images of registries still have.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
)

// layerFormats are the media types that a layer may have. Layers that are
// "foreign" or "nondistributable" are taken when the blob is where the others
// are; their URLs are not asked.
var layerFormats = map[string]format.Format{
	ocispec.MediaTypeImageLayer:     format.Tar,
	ocispec.MediaTypeImageLayerGzip: format.Gzip,
	ocispec.MediaTypeImageLayerZstd: format.Zstd,

	"application/vnd.oci.image.layer.nondistributable.v1.tar":      format.Tar,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": format.Gzip,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": format.Zstd,

	"application/vnd.docker.image.rootfs.diff.tar":              format.Tar,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":         format.Gzip,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":         format.Zstd,
	"application/vnd.docker.image.rootfs.foreign.diff.tar":      format.Tar,
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": format.Gzip,
}

// document reads a blob of JSON, verified and at most 4 MiB long.
func (im *Image) document(ctx context.Context, d ocispec.Descriptor, what string) ([]byte, error) {
	if d.Size < 0 || d.Size > maxDocument {
		return nil, archive.Refuse("the %s is said to have %d bytes: the most is %d", what, d.Size, maxDocument)
	}
	if err := d.Digest.Validate(); err != nil {
		return nil, archive.Refuse("the %s has the digest %s, which is none of sha256 and sha512", what, archive.Quote(string(d.Digest)))
	}
	r, err := im.blobs.open(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("the %s: %w", what, err)
	}
	defer r.Close()
	b, err := content.ReadAll(r, d)
	if err != nil {
		return nil, blobError(what+" "+string(d.Digest), err)
	}
	return b, nil
}

// blobError says what is wrong with a blob.
func blobError(what string, err error) error {
	switch {
	case errors.Is(err, content.ErrMismatchedDigest):
		return archive.Refuse("%s: the contents have another digest", what)
	case errors.Is(err, content.ErrTrailingData):
		return archive.Refuse("%s: it is longer than its descriptor says", what)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return archive.Refuse("%s: it is shorter than its descriptor says", what)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// decode reads JSON of an image. Fields that we do not know are other people's.
func decode(b []byte, what string, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return archive.Refuse("the %s is not the JSON that it should be", what)
	}
	return nil
}

// resolve follows a descriptor, through indexes, to the manifest for the
// platform, and reads it and its configuration.
func (im *Image) resolve(ctx context.Context, d ocispec.Descriptor) error {
	for range maxNesting + 1 {
		b, err := im.document(ctx, d, "manifest")
		if err != nil {
			return err
		}
		var probe struct {
			SchemaVersion int                  `json:"schemaVersion"`
			MediaType     string               `json:"mediaType"`
			Manifests     []ocispec.Descriptor `json:"manifests"`
			Layers        json.RawMessage      `json:"layers"`
		}
		if err := decode(b, "manifest", &probe); err != nil {
			return err
		}
		kind := probe.MediaType
		if kind == "" {
			kind = d.MediaType
		}
		switch {
		case probe.SchemaVersion == 1:
			return archive.Refuse("the image has a manifest of Docker's schema 1, which has no verified layers: push it again with a present tool")
		case probe.Manifests != nil && probe.Layers != nil:
			return archive.Refuse("the manifest is an index as well") // CVE-2021-41190
		case kind == ocispec.MediaTypeImageIndex, kind == dockerList:
			if d, err = choose(probe.Manifests, im.platform); err != nil {
				return err
			}
		case kind == ocispec.MediaTypeImageManifest, kind == dockerManifest:
			im.Digest = string(d.Digest)
			return im.manifest(ctx, b)
		default:
			return archive.Refuse("media type %s is no image", archive.Quote(kind))
		}
	}
	return archive.Refuse("indexes inside of indexes, %d deep", maxNesting+1)
}

// choose finds the manifest of a platform in an index.
func choose(list []ocispec.Descriptor, p platform) (ocispec.Descriptor, error) {
	var have []string
	for _, d := range list {
		switch q := d.Platform; {
		case q == nil && len(list) == 1:
			return d, nil // its configuration will tell
		case q == nil, q.OS == "unknown": // attestations and signatures
		case p.matches(q.OS, q.Architecture, q.Variant):
			return d, nil
		default:
			have = append(have, platform{q.OS, q.Architecture, q.Variant}.String())
		}
	}
	if len(have) > 20 {
		have = append(have[:20], "...")
	}
	return ocispec.Descriptor{}, archive.Refuse("the image is not there for %s; it has %s", p, archive.Quote(strings.Join(have, ", ")))
}

// manifest takes the layers and the configuration out of a manifest.
func (im *Image) manifest(ctx context.Context, b []byte) error {
	var m ocispec.Manifest
	if err := decode(b, "manifest", &m); err != nil {
		return err
	}
	if t := m.Config.MediaType; t != ocispec.MediaTypeImageConfig && t != dockerConfig {
		return archive.Refuse("the image's configuration is of the type %s: it is not a container image", archive.Quote(t))
	}
	config, err := im.document(ctx, m.Config, "configuration")
	if err != nil {
		return err
	}
	for _, d := range m.Layers {
		f, known := layerFormats[d.MediaType]
		if !known {
			return archive.Refuse("layer %s: media type %s is not a layer of a kind that is known", archive.Quote(string(d.Digest)), archive.Quote(d.MediaType))
		}
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return archive.Refuse("layer %s: not a valid digest, or a negative size", archive.Quote(string(d.Digest)))
		}
		im.layers = append(im.layers, layer{what: string(d.Digest), desc: d, size: d.Size, format: f})
	}
	return im.configure(config)
}

// configure reads the configuration and holds the layers against it and the limits.
func (im *Image) configure(b []byte) error {
	var c ocispec.Image
	if err := decode(b, "configuration", &c); err != nil {
		return err
	}
	if !im.platform.matches(c.OS, c.Architecture, c.Variant) {
		return archive.Refuse("the image is for %s, not for %s", archive.Quote(platform{c.OS, c.Architecture, c.Variant}.String()), im.platform)
	}
	if len(im.layers) > im.o.Limits.Layers {
		return archive.Refuse("the image has %d layers: the most is %d", len(im.layers), im.o.Limits.Layers)
	}
	if len(c.RootFS.DiffIDs) != len(im.layers) {
		return archive.Refuse("the image has %d layers, its configuration names %d", len(im.layers), len(c.RootFS.DiffIDs))
	}
	var bytes int64
	for i, l := range im.layers {
		id := c.RootFS.DiffIDs[i]
		if err := id.Validate(); err != nil {
			return archive.Refuse("the configuration's diff ID %s is no digest", archive.Quote(string(id)))
		}
		im.diffIDs = append(im.diffIDs, string(id))
		if l.size > im.o.Limits.Bytes-bytes {
			return archive.Refuse("layer %s: with it, the image has more than %d bytes", archive.Quote(l.what), im.o.Limits.Bytes)
		}
		bytes += max(l.size, 0)
	}
	im.Config = Config{
		OS: c.OS, Architecture: c.Architecture, Variant: c.Variant,
		Env: c.Config.Env, Entrypoint: c.Config.Entrypoint, Cmd: c.Config.Cmd, WorkingDir: c.Config.WorkingDir, User: c.Config.User,
		Labels: c.Config.Labels, StopSignal: c.Config.StopSignal,
	}
	return nil
}

// read gives a layer unpacked. At its end, and not before, it is verified: its
// blob by digest and size, what it unpacks to by the configuration.
func (im *Image) read(ctx context.Context, i int, unpacked *int64) (*layerReader, error) {
	l := im.layers[i]
	raw, err := im.blobs.open(ctx, l.desc)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", archive.Quote(l.what), err)
	}
	r := &layerReader{what: l.what, raw: raw, unpacked: unpacked, most: im.o.Limits.Bytes, diffID: digest.Digest(im.diffIDs[i])}
	r.diff = r.diffID.Verifier()
	in := io.Reader(raw)
	if l.desc.Digest != "" {
		r.blob = content.NewVerifyReader(raw, l.desc)
		in = r.blob
	}
	limits := format.Limits{Bytes: im.o.Limits.Bytes, Free: im.o.Limits.Free, Ratio: im.o.Limits.Ratio}
	if r.tar, err = format.Decompress(ctx, in, l.format, limits); err != nil {
		return nil, errors.Join(r.fail(err), raw.Close())
	}
	return r, nil
}

// layerReader reads a layer and verifies it.
type layerReader struct {
	what     string
	raw      io.ReadCloser
	blob     *content.VerifyReader // nil: known by its diff ID alone
	tar      io.ReadCloser
	diffID   digest.Digest
	diff     digest.Verifier
	unpacked *int64 // bytes, of all layers
	most     int64
	err      error // of reading, not io.EOF
}

func (r *layerReader) Read(p []byte) (int, error) {
	n, err := r.tar.Read(p)
	_, _ = r.diff.Write(p[:n]) // a hash
	*r.unpacked += int64(n)
	switch {
	case *r.unpacked > r.most:
		err = archive.Refuse("layer %s: with it, the image unpacks to more than %d bytes", archive.Quote(r.what), r.most)
	case errors.Is(err, io.EOF):
		err = io.EOF
	case err != nil:
		err = r.fail(err)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

func (r *layerReader) fail(err error) error { return blobError("layer "+archive.Quote(r.what), err) }

// verify reads what is left of the layer and holds all of it against the digests.
func (r *layerReader) verify() error {
	if r.err != nil {
		return r.err
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	if r.blob != nil {
		if err := r.blob.Verify(); err != nil {
			return r.fail(err)
		}
	}
	if !r.diff.Verified() {
		return archive.Refuse("layer %s: unpacked, it is not what the image's configuration says (%s)", archive.Quote(r.what), r.diffID)
	}
	return nil
}

func (r *layerReader) Close() error { return errors.Join(r.tar.Close(), r.raw.Close()) }

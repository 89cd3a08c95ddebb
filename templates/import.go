package templates

import (
	"context"
	"errors"
	"fmt"
	"io"

	"holdfast/blockdev"
	"holdfast/templates/archive"
	"holdfast/templates/oci"
)

// Import asks for a revision made of a container image of a registry.
type Import struct {
	Template string
	Version  string // empty: its number
	Image    string // "HOST[:PORT]/NAME[:TAG][@DIGEST]"
	Platform string // "OS/ARCH[/VARIANT]"; empty: linux on this host's architecture
	Actor    string
}

// Import fetches an image, builds its files into an image of ours and makes the
// revision READY, durably, before it returns; the template is made if it is not
// there, once the image was found. The revision's digest is that of the image's
// manifest.
//
// ErrInvalid for what is asked for; oci.ErrNotAllowed, oci.ErrNotFound and
// oci.ErrRegistry; ErrArchive for an image that cannot become a template, whose
// revision is FAILED once its layers were looked at. After other errors (ErrNoSpace,
// ErrBusy, the registry's, the context's) nothing is left of it but a gap in the
// numbers.
func (l *Library) Import(ctx context.Context, workspace string, i Import) (Revision, error) {
	if err := checkName(i.Template); err != nil {
		return Revision{}, err
	}
	if l.o.Registries == nil {
		return Revision{}, fmt.Errorf("%w: none is: this server fetches no images", oci.ErrNotAllowed)
	}
	image, err := l.o.Registries.Open(ctx, i.Image, l.imageOptions(i.Platform))
	if err != nil {
		return Revision{}, importError(err)
	}
	defer func() { _ = image.Close() }() // an unnamed file
	if _, _, err := l.Put(ctx, workspace, i.Template, Change{Actor: i.Actor}, true); err != nil {
		return Revision{}, err
	}
	id, _, err := l.begin(ctx, workspace, i.Template, i.Version, i.Actor)
	if err != nil {
		return Revision{}, err
	}
	v, err := l.receive(ctx, id, incoming{
		bytes:  image.BlobBytes(),
		open:   func(ctx context.Context) (io.ReadCloser, int64, error) { return image.Tar(ctx), image.BlobBytes(), nil },
		digest: func() string { return image.Digest },
	})
	if err != nil && !errors.Is(err, ErrArchive) {
		err = errors.Join(err, l.forget(context.WithoutCancel(ctx), keyOf(workspace, i.Template), id))
	}
	return v, importError(err)
}

// importError gives the errors of package oci the names of this one.
func importError(err error) error {
	switch {
	case errors.Is(err, oci.ErrInvalid):
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	case errors.Is(err, archive.ErrRefused) && !errors.Is(err, ErrArchive):
		return fmt.Errorf("%w: %w", ErrArchive, err)
	}
	return err
}

// forget drops a revision that nobody can upload to.
func (l *Library) forget(ctx context.Context, key string, id blockdev.ID) error {
	_, err := l.change(ctx, key, func(r *record) (*record, error) {
		if r == nil || r.revision(id) == nil || r.revision(id).Status != Created {
			return nil, ErrUploadGone
		}
		r.drop(id)
		return r, nil
	})
	if errors.Is(err, ErrUploadGone) {
		return nil
	}
	return err
}

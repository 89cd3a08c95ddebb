package oci

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/templates/archive"
	"holdfast/templates/format"
)

// OpenLayout reads an image layout, or the output of `docker save`, from a tar,
// a tar.gz or a tar.zst. r is read to its end, into an unnamed file in staging.
// Errors as of Image.WriteTar, and ErrInvalid for bad options.
func OpenLayout(ctx context.Context, r io.Reader, o Options) (*Image, error) {
	o.Limits = o.Limits.withDefaults()
	// The layers are compressed themselves: a layout that unpacks to many times its size is none.
	limits := format.Limits{Bytes: o.Limits.Bytes, Free: o.Limits.Free, Ratio: o.Limits.Ratio}
	s, err := format.Open(ctx, r, format.Options{Staging: o.Staging, Limits: limits})
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.Close() }() // nothing was written
	if s.Format == format.Zip {
		return nil, archive.Refuse("a layout in a zip: send it as a tar")
	}
	a, err := receive(ctx, s, o)
	if err != nil {
		return nil, err
	}
	return openLayout(ctx, a, o)
}

// OpenLayoutFile is OpenLayout for a layout that is on the host: a tar, or a
// directory. It is read where it is, and must not change while the image is open.
func OpenLayoutFile(ctx context.Context, name string, o Options) (*Image, error) {
	o.Limits = o.Limits.withDefaults()
	root, err := os.OpenRoot(name)
	if err == nil {
		return openLayout(ctx, &layoutDir{root}, o)
	}
	f, ferr := os.Open(name)
	if ferr != nil {
		return nil, ferr
	}
	defer f.Close()
	return OpenLayout(ctx, f, o)
}

// layout is where the files of a layout are.
type layout interface {
	blobs
	file(name string) (io.ReadCloser, int64, error) // os.ErrNotExist
}

func openLayout(ctx context.Context, l layout, o Options) (im *Image, err error) {
	im = &Image{blobs: l, o: o}
	if im.platform, err = parsePlatform(o.Platform); err == nil {
		err = im.readLayout(ctx, l)
	}
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	return im, nil
}

func (im *Image) readLayout(ctx context.Context, l layout) error {
	b, err := small(l, ocispec.ImageIndexFile)
	if errors.Is(err, os.ErrNotExist) {
		return im.readSaved(l)
	}
	if err != nil {
		return err
	}
	var index ocispec.Index
	if err := decode(b, ocispec.ImageIndexFile, &index); err != nil {
		return err
	}
	d, err := chooseTagged(index.Manifests, im.o.Tag, im.platform)
	if err != nil {
		return err
	}
	return im.resolve(ctx, d)
}

// chooseTagged finds an image in a layout: the one with the tag, the only one,
// or the one for the platform.
func chooseTagged(list []ocispec.Descriptor, tag string, p platform) (ocispec.Descriptor, error) {
	var names []string
	candidates := list
	if tag != "" {
		candidates = nil
	}
	for _, d := range list {
		name := d.Annotations[ocispec.AnnotationRefName]
		full := d.Annotations["io.containerd.image.name"] // as docker save writes it
		if tag != "" && (name == tag || full == tag) {
			candidates = append(candidates, d)
		}
		if name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	switch {
	case len(list) == 0:
		return ocispec.Descriptor{}, archive.Refuse("the layout holds no image")
	case len(candidates) == 0:
		return ocispec.Descriptor{}, archive.Refuse("the layout holds no image %s; it has %s", archive.Quote(tag), archive.Quote(strings.Join(names, ", ")))
	case tag == "" && len(names) > 1:
		return ocispec.Descriptor{}, archive.Refuse("the layout holds several images, %s: say which", archive.Quote(strings.Join(names, ", ")))
	}
	return choose(candidates, p)
}

// saved is manifest.json as `docker save` writes it.
type saved []struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// readSaved reads the output of a `docker save` that is no layout as well.
func (im *Image) readSaved(l layout) error {
	b, err := small(l, "manifest.json")
	if errors.Is(err, os.ErrNotExist) {
		return archive.Refuse("neither an OCI layout nor the output of docker save: it has no index.json and no manifest.json")
	}
	if err != nil {
		return err
	}
	var all saved
	if err := decode(b, "manifest.json", &all); err != nil {
		return err
	}
	at := slices.IndexFunc(all, func(s struct {
		Config   string
		RepoTags []string
		Layers   []string
	}) bool {
		return im.o.Tag == "" || slices.Contains(s.RepoTags, im.o.Tag)
	})
	if at < 0 || im.o.Tag == "" && len(all) > 1 {
		return archive.Refuse("manifest.json holds %d images, and none or several of them are %s", len(all), archive.Quote(im.o.Tag))
	}
	config, err := small(l, all[at].Config)
	if err != nil {
		return missingFile(all[at].Config, err)
	}
	im.Digest = string(digest.FromBytes(config))
	for _, name := range all[at].Layers {
		im.layers = append(im.layers, layer{what: name, desc: ocispec.Descriptor{Annotations: map[string]string{fileName: name}}, size: -1, format: format.Tar})
	}
	return im.configure(config)
}

// fileName is the annotation that tells where a layer without a digest is.
const fileName = "file"

func missingFile(name string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return archive.Refuse("the layout has no file %s", archive.Quote(name))
	}
	return err
}

// small reads a file of a layout that is at most maxDocument long.
func small(l layout, name string) ([]byte, error) {
	r, size, err := l.file(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if size > maxDocument {
		return nil, archive.Refuse("%s has %d bytes: the most is %d", archive.Quote(name), size, maxDocument)
	}
	return io.ReadAll(io.LimitReader(r, maxDocument))
}

// blobFile is where a layout has a blob.
func blobFile(d ocispec.Descriptor) string {
	if name := d.Annotations[fileName]; d.Digest == "" {
		return name
	}
	return path.Join(ocispec.ImageBlobsDir, string(d.Digest.Algorithm()), d.Digest.Encoded())
}

func openBlob(l layout, d ocispec.Descriptor) (io.ReadCloser, error) {
	r, _, err := l.file(blobFile(d))
	if err != nil {
		return nil, missingFile(blobFile(d), err)
	}
	return r, nil
}

// layoutDir is a layout in a directory of the host.
type layoutDir struct{ root *os.Root }

func (l *layoutDir) open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	return openBlob(l, d)
}

func (l *layoutDir) prepare(context.Context, []layer) error { return nil }
func (l *layoutDir) close() error                           { return l.root.Close() }

func (l *layoutDir) file(name string) (io.ReadCloser, int64, error) {
	info, err := l.root.Stat(name)
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() { // a pipe would be waited for
		return nil, 0, archive.Refuse("%s is not a file", archive.Quote(name))
	}
	f, err := l.root.Open(name)
	return f, info.Size(), err
}

// layoutTar is a layout in a tar, by its entries.
type layoutTar struct {
	f       *os.File
	files   map[string]place
	reserve func(int64) (func(), error)
	room    int64 // bytes that were reserved and not used
	release []func()
	full    error // why staging took no more
}

// place is where a file is in a tar; or what it is a link to.
type place struct {
	offset, size int64
	link         string
}

// maxFiles bounds the entries of a tar that holds a layout: a few for each layer.
const maxFiles = 10_000

// receive keeps a tar and notes where its files are.
func receive(ctx context.Context, r io.Reader, o Options) (*layoutTar, error) {
	f, err := unnamed(o.Staging)
	if err != nil {
		return nil, err
	}
	l := &layoutTar{f: f, files: map[string]place{}, reserve: o.Reserve}
	w := bufio.NewWriterSize(writerFunc(l.write), 1<<20)
	in := &counted{r: io.TeeReader(r, w)}
	err = l.index(ctx, in)
	if err == nil {
		_, err = io.Copy(io.Discard, in)
	}
	err = errors.Join(err, w.Flush())
	if l.full != nil { // which a reader of the tar says in its own words
		err = l.full
	}
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

type writerFunc func([]byte) (int, error)

func (w writerFunc) Write(p []byte) (int, error) { return w(p) }

// reserveStep is how much of staging is asked for at once, in bytes.
const reserveStep = 64 << 20

// write keeps the next bytes, once there is room for them.
func (l *layoutTar) write(p []byte) (int, error) {
	for l.reserve != nil && l.room < int64(len(p)) {
		release, err := l.reserve(reserveStep)
		if err != nil {
			l.full = err
			return 0, err
		}
		l.room += reserveStep
		l.release = append(l.release, release)
	}
	n, err := l.f.Write(p)
	l.room -= int64(n)
	if err != nil {
		l.full = fmt.Errorf("staging: %w", err)
	}
	return n, err
}

type counted struct {
	r   io.Reader
	n   int64
	err error // not io.EOF
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}

func (l *layoutTar) index(ctx context.Context, in *counted) error {
	tr := tar.NewReader(in)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case in.err != nil:
			return in.err
		case err != nil:
			return archive.Refuse("the layout's tar: %w after %d bytes", err, in.n)
		}
		name := path.Clean(h.Name)
		p := place{offset: in.n, size: h.Size}
		switch h.Typeflag {
		case tar.TypeReg:
			if h.PAXRecords["GNU.sparse.major"] != "" || h.PAXRecords["GNU.sparse.map"] != "" {
				return archive.RefuseEntry(h.Name, "a sparse file in a layout")
			}
		case tar.TypeSymlink: // as older docker save has for layers that come twice
			p.link = path.Join(path.Dir(name), h.Linkname)
		case tar.TypeDir, tar.TypeXGlobalHeader:
			continue
		default:
			return archive.RefuseEntry(h.Name, "a layout holds files and directories only")
		}
		if _, twice := l.files[name]; twice {
			return archive.RefuseEntry(h.Name, "it is in the layout twice")
		}
		if len(l.files) >= maxFiles {
			return archive.RefuseEntry(h.Name, "a layout of more than %d files", maxFiles)
		}
		l.files[name] = p
	}
}

func (l *layoutTar) file(name string) (io.ReadCloser, int64, error) {
	for range 8 {
		p, ok := l.files[path.Clean(name)]
		if !ok {
			return nil, 0, os.ErrNotExist
		}
		if p.link == "" {
			return io.NopCloser(io.NewSectionReader(l.f, p.offset, p.size)), p.size, nil
		}
		name = p.link
	}
	return nil, 0, archive.Refuse("%s is a link that leads nowhere", archive.Quote(name))
}

func (l *layoutTar) open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	return openBlob(l, d)
}

func (l *layoutTar) prepare(context.Context, []layer) error { return nil }

func (l *layoutTar) close() error {
	err := l.f.Close()
	for _, release := range l.release {
		release()
	}
	l.release = nil
	return err
}

// unnamed makes a file that goes with its descriptor, whatever happens.
func unnamed(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "image-*")
	if err != nil {
		return nil, fmt.Errorf("staging: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("staging: %w", err), f.Close())
	}
	return f, nil
}

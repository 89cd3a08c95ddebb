package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/templates/archive"
	"holdfast/templates/format"
)

// Limits bound an image. Sizes are in bytes.
type Limits struct {
	Bytes   int64 // of all blobs together, and again of all layers unpacked; 0: 64 GiB
	Entries int64 // of all layers together, whiteouts too; 0, and at most: 1,000,000
	Layers  int   // 0: 128
	Free    int64 // of an unpacked layer, see format.Limits
	Ratio   int64
}

const (
	maxEntries  = 1_000_000 // about 150 bytes of memory each
	maxLayers   = 128
	maxDocument = 4 << 20 // bytes of an index, a manifest or a configuration
	maxNesting  = 3       // indexes inside of an index
)

func (l Limits) withDefaults() Limits {
	l.Bytes = cmp.Or(l.Bytes, 64<<30)
	l.Entries = min(cmp.Or(l.Entries, maxEntries), maxEntries)
	l.Layers = cmp.Or(l.Layers, maxLayers)
	return l
}

// Options say which image is wanted and how it is read.
type Options struct {
	Platform string // "OS/ARCH" or "OS/ARCH/VARIANT"; empty: linux on this host's architecture
	Tag      string // of a layout with several images: the name (org.opencontainers.image.ref.name) or RepoTag
	Staging  string // directory for unnamed files: as much as the blobs have
	Limits   Limits

	// Reserve is asked for so many bytes of staging each time that a layout needs
	// more of it; what it gives is called when the image is closed. nil: nobody is
	// asked.
	Reserve func(bytes int64) (release func(), err error)

	// OmitDevices leaves device nodes, pipes and sockets out. Without it they
	// are in the tar, and package archive refuses them by name.
	OmitDevices bool
}

// Image is an image whose manifest and configuration were read and verified. It
// is for one goroutine at a time.
type Image struct {
	Digest string // "sha256:..." of the manifest; of `docker save` without one, of the configuration
	Config Config

	platform platform
	layers   []layer
	diffIDs  []string
	blobs    blobs
	o        Options
}

// Config is what an image says of how it wants to be run. It is a tenant's text.
type Config struct {
	OS, Architecture, Variant string

	Env        []string // "NAME=VALUE"
	Entrypoint []string
	Cmd        []string
	WorkingDir string
	User       string // "name", "uid", "uid:gid", "name:group"
	Labels     map[string]string
	StopSignal string
}

// Close gives up what the image holds: files in staging, connections.
func (im *Image) Close() error { return im.blobs.close() }

// Layers is how many layers the image has.
func (im *Image) Layers() int { return len(im.layers) }

// BlobBytes is how many bytes the layers have as they are stored; -1 when the
// image does not say.
func (im *Image) BlobBytes() int64 {
	var sum int64
	for _, l := range im.layers {
		if l.size < 0 {
			return -1
		}
		sum += l.size
	}
	return sum
}

// Tar gives the tree as a plain tar (PAX), like WriteTar. Close ends it at any place.
func (im *Image) Tar(ctx context.Context) io.ReadCloser {
	ctx, cancel := context.WithCancel(ctx)
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.CloseWithError(im.WriteTar(ctx, w)) // always nil
	}()
	return &stream{PipeReader: r, cancel: cancel, done: done}
}

type stream struct {
	*io.PipeReader
	cancel context.CancelFunc
	done   chan struct{}
}

func (s *stream) Close() error {
	s.cancel()
	err := s.PipeReader.Close()
	<-s.done
	return err
}

// platform is what an image runs on.
type platform struct{ os, arch, variant string }

func (p platform) String() string {
	if p.variant != "" {
		return p.os + "/" + p.arch + "/" + p.variant
	}
	return p.os + "/" + p.arch
}

// ErrInvalid is in the chain of errors about what was asked for: a platform or a
// reference that cannot be.
var ErrInvalid = errors.New("invalid image")

func parsePlatform(text string) (platform, error) {
	if text == "" {
		return platform{os: "linux", arch: runtime.GOARCH}, nil
	}
	parts := strings.Split(text, "/")
	if len(parts) < 2 || len(parts) > 3 || len(text) > 64 || strings.Contains("/"+text+"/", "//") {
		return platform{}, fmt.Errorf("%w: platform %s: must be OS/ARCH or OS/ARCH/VARIANT, as linux/amd64", ErrInvalid, archive.Quote(text))
	}
	p := platform{os: parts[0], arch: parts[1]}
	if len(parts) == 3 {
		p.variant = parts[2]
	}
	return p, nil
}

// matches tells whether what an index or a configuration says fits. A missing
// variant fits any.
func (p platform) matches(os, arch, variant string) bool {
	return (os == "" || os == p.os) && (arch == "" || arch == p.arch) && (p.variant == "" || variant == "" || variant == p.variant)
}

// layer is one layer of an image.
type layer struct {
	what   string             // for messages: its digest or name
	desc   ocispec.Descriptor // without a digest for `docker save`
	size   int64              // bytes as stored; -1: not known
	format format.Format      // how it is packed
}

package archivetest

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layer is one layer of an image: a tar, as it is stored.
type Layer struct {
	Tar    []byte // unpacked
	Blob   []byte // as stored; nil: Tar
	Type   string // media type; empty: of a plain tar
	Claims *ocispec.Descriptor
	DiffID string // empty: the right one
}

// Plain, Gzipped and Zstandard are a layer of these entries.
func Plain(entries ...Entry) Layer { return Layer{Tar: Tar(entries...)} }

// Gzipped is a layer of these entries in a gzip.
func Gzipped(entries ...Entry) Layer {
	l := Plain(entries...)
	l.Blob, l.Type = Gzip(l.Tar), ocispec.MediaTypeImageLayerGzip
	return l
}

// Zstandard is a layer of these entries in a zstd.
func Zstandard(entries ...Entry) Layer {
	l := Plain(entries...)
	l.Blob, l.Type = Zstd(l.Tar), ocispec.MediaTypeImageLayerZstd
	return l
}

func (l Layer) blob() []byte {
	if l.Blob == nil {
		return l.Tar
	}
	return l.Blob
}

func (l Layer) descriptor() ocispec.Descriptor {
	if l.Claims != nil {
		return *l.Claims
	}
	d := Descriptor(l.Type, l.blob())
	if l.Type == "" {
		d.MediaType = ocispec.MediaTypeImageLayer
	}
	return d
}

// Descriptor describes a blob rightly.
func Descriptor(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// Layout is an image layout while it is made: its files by name. What the
// methods make is right; a test changes what it wants to be wrong.
type Layout struct {
	Files    map[string][]byte
	Index    ocispec.Index
	Config   ocispec.Image    // of images that are added
	Manifest ocispec.Manifest // of the one that was added last
}

// NewLayout makes a layout with an image of layers for linux/amd64.
func NewLayout(layers ...Layer) *Layout {
	l := &Layout{Files: map[string][]byte{ocispec.ImageLayoutFile: []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
	l.Config.OS, l.Config.Architecture = "linux", "amd64"
	l.Config.Config = ocispec.ImageConfig{
		Env: []string{"PATH=/bin", "LANG=C"}, Entrypoint: []string{"/bin/init"}, Cmd: []string{"serve", "--all"}, WorkingDir: "/srv", User: "1000:1000",
	}
	l.Index.Versioned = specs.Versioned{SchemaVersion: 2}
	l.Index.MediaType = ocispec.MediaTypeImageIndex
	l.Index.Manifests = []ocispec.Descriptor{l.Add(layers...)}
	return l
}

// Add puts a further image into the layout and gives its descriptor, which is
// not in the index yet.
func (l *Layout) Add(layers ...Layer) ocispec.Descriptor {
	config := l.Config
	config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	l.Manifest = ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	for _, layer := range layers {
		d := layer.descriptor()
		l.Manifest.Layers = append(l.Manifest.Layers, d)
		l.put(d.Digest, layer.blob())
		id := digest.Digest(layer.DiffID)
		if id == "" {
			id = digest.FromBytes(layer.Tar)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, id)
	}
	l.Manifest.Config = l.Blob(ocispec.MediaTypeImageConfig, encode(config))
	return l.PutManifest()
}

// PutManifest stores Manifest, as it is now, and gives its descriptor.
func (l *Layout) PutManifest() ocispec.Descriptor {
	d := l.Blob(ocispec.MediaTypeImageManifest, encode(l.Manifest))
	d.Platform = &ocispec.Platform{OS: l.Config.OS, Architecture: l.Config.Architecture}
	return d
}

// Blob stores a blob and describes it.
func (l *Layout) Blob(mediaType string, b []byte) ocispec.Descriptor {
	d := Descriptor(mediaType, b)
	l.put(d.Digest, b)
	return d
}

func (l *Layout) put(d digest.Digest, b []byte) {
	if d.Validate() == nil {
		l.Files["blobs/"+d.Algorithm().String()+"/"+d.Encoded()] = b
	}
}

// Tar packs the layout.
func (l *Layout) Tar() []byte {
	if _, ok := l.Files[ocispec.ImageIndexFile]; !ok {
		l.Files[ocispec.ImageIndexFile] = encode(l.Index)
	}
	return l.Packed()
}

// Packed packs the files, without an index unless there is one.
func (l *Layout) Packed() []byte {
	var entries []Entry
	var names []string
	for name := range l.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		entries = append(entries, Entry{tar.Header{Name: name, Mode: 0o644}, string(l.Files[name])})
	}
	return Tar(entries...)
}

// DockerSave packs layers as `docker save` did before it wrote layouts.
func DockerSave(l *Layout, layers ...Layer) []byte {
	config := l.Config
	config.RootFS = ocispec.RootFS{Type: "layers"}
	files := map[string][]byte{}
	var names []string
	for i, layer := range layers {
		name := fmt.Sprintf("%064d/layer.tar", i)
		names = append(names, name)
		files[name] = layer.Tar
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(layer.Tar))
	}
	b := encode(config)
	name := digest.FromBytes(b).Encoded() + ".json"
	files[name] = b
	files["manifest.json"] = encode([]map[string]any{{"Config": name, "RepoTags": []string{"app:1"}, "Layers": names}})
	return (&Layout{Files: files}).Packed()
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	must(err)
	return b
}

// PutIndex stores Index as a blob and describes it.
func (l *Layout) PutIndex() ocispec.Descriptor {
	return l.Blob(ocispec.MediaTypeImageIndex, encode(l.Index))
}

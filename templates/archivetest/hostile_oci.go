package archivetest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layout is a case of an image layout that is changed before it is packed.
func layout(name, entry, says string, change func(*Layout), layers ...Layer) Case {
	return Case{Name: "oci: " + name, Format: "oci", Entry: entry, Says: says, Make: func() []byte {
		if len(layers) == 0 {
			layers = []Layer{Gzipped(Dir("d"), Holding("d/f", noise(3000)))}
		}
		l := NewLayout(layers...)
		if change != nil {
			change(l)
		}
		return l.Tar()
	}}
}

func blobName(d ocispec.Descriptor) string {
	return "blobs/" + d.Digest.Algorithm().String() + "/" + d.Digest.Encoded()
}

// layouts are wrong before a layer is looked at.
func layouts(Bounds) []Case {
	index := func(text string) func(*Layout) {
		return func(l *Layout) { l.Files[ocispec.ImageIndexFile] = []byte(text) }
	}
	blob := func(which func(*Layout) ocispec.Descriptor, fn func([]byte) []byte) func(*Layout) {
		return func(l *Layout) {
			name := blobName(which(l))
			if b := fn(bytes.Clone(l.Files[name])); b != nil {
				l.Files[name] = b
			} else {
				delete(l.Files, name)
			}
		}
	}
	manifest := func(l *Layout) ocispec.Descriptor { return l.Index.Manifests[0] }
	config := func(l *Layout) ocispec.Descriptor { return l.Manifest.Config }
	first := func(l *Layout) ocispec.Descriptor { return l.Manifest.Layers[0] }
	other := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	shorter := func(b []byte) []byte { return b[:len(b)-1] }
	longer := func(b []byte) []byte { return append(b, ' ') }
	gone := func([]byte) []byte { return nil }
	remade := func(fn func(l *Layout)) func(*Layout) {
		return func(l *Layout) {
			fn(l)
			l.Index.Manifests[0] = l.PutManifest()
		}
	}
	document := func(mediaType, text string) func(*Layout) {
		return func(l *Layout) { l.Index.Manifests[0] = l.Blob(mediaType, []byte(text)) }
	}
	configured := func(text string) func(*Layout) {
		return remade(func(l *Layout) { l.Manifest.Config = l.Blob(ocispec.MediaTypeImageConfig, []byte(text)) })
	}
	list := []Case{
		layout("an index that is no JSON", "", "JSON", index("not JSON")),
		layout("an empty index", "", "no image", index(`{"schemaVersion":2,"manifests":[]}`)),
		layout("an index without manifests", "", "no image", index(`{}`)),
		layout("an index of 5 MiB", "", "the most is", index(strings.Repeat(" ", 5<<20))),
		layout("a manifest with a path for a digest", "", "digest", index(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:../../../etc/passwd","size":10}]}`)),
		layout("a manifest without a digest", "", "digest", index(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":10}]}`)),
		layout("a manifest with a weak digest", "", "digest", index(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"md5:d41d8cd98f00b204e9800998ecf8427e","size":10}]}`)),
		layout("a manifest of exabytes", "", "the most is", func(l *Layout) { l.Index.Manifests[0].Size = 1 << 62 }),
		layout("a manifest of negative size", "", "the most is", func(l *Layout) { l.Index.Manifests[0].Size = -1 }),
		layout("only for another platform", "", "not there for", func(l *Layout) {
			d := l.Index.Manifests[0]
			d.Platform = &ocispec.Platform{OS: "windows", Architecture: "amd64"}
			l.Index.Manifests = []ocispec.Descriptor{d, d}
		}),
		layout("two images and no name", "", "several images", func(l *Layout) {
			d := l.Index.Manifests[0]
			a, b := d, d
			a.Annotations, b.Annotations = map[string]string{ocispec.AnnotationRefName: "a"}, map[string]string{ocispec.AnnotationRefName: "b"}
			l.Index.Manifests = []ocispec.Descriptor{a, b}
		}),
		layout("an index that names itself at no end", "", "deep", func(l *Layout) {
			for range 6 {
				d := l.PutIndex()
				d.Platform = l.Index.Manifests[0].Platform
				l.Index.Manifests = []ocispec.Descriptor{d}
			}
		}),
		layout("an index as a manifest", "", "no image", document("text/plain", `{"schemaVersion":2}`)),
		layout("index and manifest in one", "", "as well", document(ocispec.MediaTypeImageManifest, `{"schemaVersion":2,"manifests":[],"layers":[]}`)),
		layout("a manifest of schema 1", "", "schema 1", document("application/vnd.docker.distribution.manifest.v1+json", `{"schemaVersion":1,"fsLayers":[]}`)),
		layout("a manifest of something else", "", "not a container image", remade(func(l *Layout) { l.Manifest.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" })),
		layout("a layer of something else", "", "not a layer", remade(func(l *Layout) {
			l.Manifest.Layers[0].MediaType = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
		})),
		layout("an encrypted layer", "", "not a layer", remade(func(l *Layout) { l.Manifest.Layers[0].MediaType += "+encrypted" })),
		layout("a layer with a path for a digest", "", "digest", remade(func(l *Layout) { l.Manifest.Layers[0].Digest = "sha256:../../x" })),
		layout("a layer of negative size", "", "negative", remade(func(l *Layout) { l.Manifest.Layers[0].Size = -5 })),
		layout("a layer of exabytes", "", "more than", remade(func(l *Layout) { l.Manifest.Layers[0].Size = 1 << 62 })),
		layout("a layer that is elsewhere", "", "no file", remade(func(l *Layout) {
			l.Manifest.Layers[0].Digest = digest.FromString("elsewhere")
			l.Manifest.Layers[0].URLs = []string{"http://169.254.169.254/latest/meta-data", "file:///etc/passwd"}
		})),
		layout("more layers than the configuration has", "", "names 1", remade(func(l *Layout) { l.Manifest.Layers = append(l.Manifest.Layers, l.Manifest.Layers[0]) })),
		layout("fewer layers than the configuration has", "", "names 1", remade(func(l *Layout) { l.Manifest.Layers = nil })),
		layout("a configuration that is no JSON", "", "JSON", configured("[]")),
		layout("a configuration without layers", "", "names 0", configured(`{"os":"linux","architecture":"amd64"}`)),
		layout("a configuration of another platform", "", "not for", configured(`{"os":"plan9","architecture":"amd64","rootfs":{"diff_ids":["sha256:x"]}}`)),
		layout("a diff ID that is no digest", "", "no digest", configured(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["sha256:x"]}}`)),
		layout("a layer as another compression", "", "layer", remade(func(l *Layout) { l.Manifest.Layers[0].MediaType = ocispec.MediaTypeImageLayerZstd })),
		layout("a compressed layer as a plain one", "", "layer", remade(func(l *Layout) { l.Manifest.Layers[0].MediaType = ocispec.MediaTypeImageLayer })),
		layout("129 layers", "", "the most is 128", nil, func() (many []Layer) {
			for range 129 {
				many = append(many, Plain(File("f")))
			}
			return many
		}()...),
		layout("a layer that unpacks to something else", "", "not what the image's configuration says", nil, func() Layer {
			l := Gzipped(File("f"))
			l.DiffID = string(digest.FromString("another"))
			return l
		}()),
	}
	for what, which := range map[string]func(*Layout) ocispec.Descriptor{"manifest": manifest, "configuration": config, "layer": first} {
		says := "another digest"
		if what == "layer" {
			says = "layer" // what unpacks it notices first
		}
		list = append(list,
			layout("a "+what+" with other bytes", "", says, blob(which, other)),
			layout("a "+what+" that is shorter", "", "shorter", blob(which, shorter)),
			layout("a "+what+" that is longer", "", "longer", blob(which, longer)),
			layout("no "+what, "", "no file", blob(which, gone)),
			layout("an empty "+what, "", "shorter", blob(which, func([]byte) []byte { return []byte{} })),
		)
	}
	return append(list, packings()...)
}

// packings are layouts whose tar is wrong.
func packings() []Case {
	c := func(name, entry, says string, make func() []byte) Case {
		return Case{Name: "oci: " + name, Format: "oci", Entry: entry, Says: says, Make: make}
	}
	good := NewLayout(Gzipped(File("f"))).Tar()
	files := func(entries ...Entry) func() []byte { return func() []byte { return Tar(entries...) } }
	save := func(text string, entries ...Entry) func() []byte {
		return files(append([]Entry{Holding("manifest.json", text)}, entries...)...)
	}
	return []Case{
		c("no layout at all", "", "neither", files(File("a"))),
		c("a layout in a zip", "", "zip", func() []byte { return Zip(Stored("index.json", "{}")) }),
		c("a layout that is cut off", "", "", fixed(good[:len(good)/2])),
		c("a compressed layout that is cut off", "", "cut off", func() []byte { b := Gzip(good); return b[:len(b)-20] }),
		c("a file twice", "index.json", "twice", files(Holding("index.json", "{}"), Holding("./index.json", "{}"))),
		c("a device in the layout", "blobs", "files and directories only", files(Special("blobs", tar.TypeBlock))),
		c("a hard link in the layout", "index.json", "files and directories only", files(Link("index.json", "/etc/passwd"))),
		c("an index that is a symlink out", "", "neither", files(Symlink("index.json", "../../../../etc/passwd"))),
		c("an index that is a symlink to itself", "", "leads nowhere", files(Symlink("index.json", "index.json"))),
		c("a sparse file in the layout", "", "sparse", func() []byte { return OldSparse(1 << 40) }),
		c("ten thousand files", "", "more than 10000 files", files(Times(10_001, func(i int) Entry { return Holding(fmt.Sprint(i), "") })...)),
		c("docker save without images", "", "0 images", save(`[]`)),
		c("docker save that is no list", "", "JSON", save(`{"Config":"x"}`)),
		c("docker save with a path out", "", "no file", save(`[{"Config":"../../../etc/passwd","Layers":[]}]`)),
		c("docker save with a layer out", "", "no file", save(`[{"Config":"c","Layers":["/etc/passwd"]}]`, Holding("c", `{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["`+string(digest.FromString("x"))+`"]}}`))),
		c("docker save with several images", "", "2 images", save(`[{"Config":"a"},{"Config":"b"}]`)),
		c("docker save with a wrong layer", "", "not what the image's configuration says", save(`[{"Config":"c","Layers":["l"]}]`,
			Holding("c", `{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["`+string(digest.FromString("x"))+`"]}}`), Holding("l", string(Tar(File("f")))))),
	}
}

// layers are wrong inside.
func layers(l Bounds) []Case {
	one := func(name, entry, says string, entries ...Entry) Case {
		return layout("layer: "+name, entry, says, nil, Gzipped(entries...))
	}
	two := func(name, entry, says string, lower, upper Layer) Case {
		return layout("layer: "+name, entry, says, nil, lower, upper)
	}
	raw := func(name, entry, says string, b []byte) Case {
		return layout("layer: "+name, entry, says, nil, Layer{Tar: b})
	}
	chain := []Entry{Dir("end")}
	for i := range 50 {
		chain = append(chain, Symlink(fmt.Sprintf("s%d", i), fmt.Sprintf("s%d", i+1)))
	}
	chain = append(chain, Symlink("s50", "end"))
	list := []Case{
		one("parent", "../evil", `".."`, File("../evil")),
		one("parent in the middle", "a/../../evil", `".."`, File("a/../../evil")),
		one("device", "null", "device", Special("null", tar.TypeChar)),
		one("pipe", "p", "pipe", Special("p", tar.TypeFifo)),
		one("hard link outside", "h", `".."`, Link("h", "../../etc/shadow")),
		one("hard link to the host", "h", "not an earlier entry", Link("h", "/etc/shadow")),
		one("hard link to the future", "h", "not an earlier entry", Link("h", "f"), File("f")),
		one("hard link to a directory", "h", "to the directory", Dir("d"), Link("h", "d")),
		one("hard link to the root", "h", "to the root", Link("h", "/")),
		one("below a file", "f/x", "below", File("f"), File("f/x")),
		one("below a symlink to itself", "s/x", "symbolic links on its way", Symlink("s", "s"), File("s/x")),
		one("below symlinks in a circle", "a/x", "symbolic links on its way", Symlink("a", "b"), Symlink("b", "a"), File("a/x")),
		one("below a chain of symlinks", "s0/x", "symbolic links on its way", append(chain, File("s0/x"))...),
		one("file as root", "./", "root", Symlink("./", "/etc")),
		one("whiteout of nothing", ".wh.", "whiteout", File("d/.wh.")),
		one("whiteout of the directory itself", ".wh..", "whiteout", File("d/.wh..")),
		one("whiteout of the parent", ".wh...", "whiteout", File("d/.wh...")),
		one("name of 256 bytes", "nnn", "longer than", File(strings.Repeat("n", 256))),
		one("a symlink to a long name, below it", "s/x", "longer than", Symlink("s", strings.Repeat("n", 300)), File("s/x")),
		one("attribute of no namespace", "a", "is not one of", With(File("a"), "color", "x")),
		one("year 1800", "a", "modification time", Entry{Header: tar.Header{Name: "a", Format: tar.FormatPAX, ModTime: unixYear1800}}),
		two("hard link to what was taken away", "h", "not an earlier entry", Plain(File("f")), Plain(File(".wh.f"), Link("h", "f"))),
		two("hard link through a symlink out", "h", "not an earlier entry", Plain(Symlink("s", "/etc")), Plain(Link("h", "s/passwd"))),
		two("device over a file", "f", "device", Plain(File("f")), Plain(Special("f", tar.TypeBlock))),
		two("below what is a file in the lower layer", "f/x", "below", Plain(File("f")), Plain(File("f/x"))),
		raw("text", "", "layer", []byte(strings.Repeat("This is no tar. ", 100))),
		raw("cut off", "f", "layer", Tar(Holding("f", noise(5000)))[:3000]),
		raw("wrong checksum", "", "layer", func() []byte { b := Tar(File("f")); b[3] ^= 1; return b }()),
		raw("unknown type", "a", "not known", Ended(Raw("a", 'Z', 0, ""))),
		raw("empty symlink", "s", "target", Ended(Raw("s", tar.TypeSymlink, 0, ""))),
		raw("sparse file of exabytes", "sparse", "the most is", OldSparse(8_000_000_000_000_000_000)),
		raw("sparse file over the limit", "sparse", "the most is", OldSparse(l.Bytes+1)),
		raw("PAX header above 1 MiB", "", "layer", Ended(PAX("comment="+strings.Repeat("c", 2<<20)), Raw("a", tar.TypeReg, 0, ""))),
	}
	if l.Entries <= 10_000 {
		list = append(list, two("too many entries together", "", "entries",
			Plain(Times(int(l.Entries)-1, func(i int) Entry { return File(fmt.Sprint(i)) })...), Plain(File("1"), File("2"))))
	}
	return list
}

// unixYear1800 is before every time that a template can hold.
var unixYear1800 = time.Date(1800, 1, 1, 0, 0, 0, 0, time.UTC)

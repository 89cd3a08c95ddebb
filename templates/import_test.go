package templates_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev/filesystem"
	"holdfast/templates"
	"holdfast/templates/archivetest"
	"holdfast/templates/oci"
	"holdfast/templates/oci/registrytest"
	"holdfast/templates/treetest"
)

// An image of a registry becomes a version, or says why not; a version that
// nobody could upload to does not stay.
func TestImport(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	registries, err := oci.NewRegistries(oci.RegistryOptions{Hosts: []string{"http://" + s.Host}, Stall: 3 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	r := reflinkRig(t, 1<<30, func(o *templates.Options) { o.Registries, o.MaxArchiveBytes = registries, 32*mib })
	l := archivetest.NewLayout(archivetest.Gzipped(archivetest.Holding("d/f", strings.Repeat("x", 100_000)), archivetest.Holding("gone", "x")),
		archivetest.Zstandard(archivetest.Link("d/g", "d/f"), archivetest.Holding(".wh.gone", "")))
	image := s.Push("app:1", l, l.Index.Manifests[0])
	load := func(template, image string) (templates.Revision, error) {
		return r.Import(t.Context(), workspace, templates.Import{Template: template, Image: image, Platform: "linux/amd64", Actor: actor})
	}
	v, err := load("app", image)
	if err != nil {
		t.Fatal(err)
	}
	if v.Status != templates.Ready || v.Number != 1 || v.Digest != string(l.Index.Manifests[0].Digest) || v.Entries != 2 || v.ContentBytes != 100_000 {
		t.Errorf("%+v", v)
	}
	tree := treetest.Survey(t, r.mounted(templates.SourceSpec{Filesystem: filesystem.Ext4, Size: v.MinimumBytes, Revision: v.ID}))
	if len(tree) != 4 || tree["d/f"].Peers != "d/f\x00d/g" {
		t.Errorf("%+v", tree)
	}
	for what, c := range map[string]struct {
		template, image string
		want            error
	}{
		"no such image":           {"none", s.Host + "/app:2", oci.ErrNotFound},
		"a registry of nobody's":  {"none", "registry.example/app", oci.ErrNotAllowed},
		"no reference":            {"none", "app", templates.ErrInvalid},
		"no name":                 {"UPPER", image, templates.ErrInvalid},
		"an image that is no tar": {"app", s.Push("hostile:1", archivetest.NewLayout(archivetest.Plain(archivetest.File("../evil"))), archivetest.NewLayout(archivetest.Plain(archivetest.File("../evil"))).Index.Manifests[0]), templates.ErrArchive},
	} {
		if _, err := load(c.template, c.image); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := r.Template(workspace, "none"); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("a template without an image: %v", err)
	}
	have, err := r.Template(workspace, "app")
	if last := have.Revisions[len(have.Revisions)-1]; err != nil || len(have.Revisions) != 2 || last.Status != templates.Failed || !strings.Contains(last.Failure, "../evil") {
		t.Errorf("%+v, %v", have.Revisions, err)
	}

	// A layer that the registry's disk has lost a part of, no room, no patience.
	if err := os.Truncate(s.Blob(l.Manifest.Layers[0].Digest), 10); err != nil {
		t.Fatal(err)
	}
	if _, err := load("app", image); !errors.Is(err, templates.ErrArchive) && !errors.Is(err, oci.ErrRegistry) {
		t.Errorf("a damaged layer: %v", err)
	}
	other := archivetest.NewLayout(archivetest.Gzipped(archivetest.Holding("f", "another")))
	image = s.Push("other:1", other, other.Index.Manifests[0])
	r.space.limit = 10
	if _, err := load("app", image); !errors.Is(err, templates.ErrNoSpace) {
		t.Errorf("without room: %v", err)
	}
	r.space.limit = 0
	goOn := s.Pause()
	if _, err := load("app", image); !errors.Is(err, oci.ErrRegistry) {
		t.Errorf("a registry that stands still: %v", err)
	}
	goOn()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Import(ctx, workspace, templates.Import{Template: "app", Image: image, Platform: "linux/amd64"}); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody waits: %v", err)
	}
	have, err = r.Template(workspace, "app")
	for _, v := range have.Revisions {
		if err != nil || v.Status == templates.Created {
			t.Errorf("left behind: %+v, %v", v, err)
		}
	}
	r.expectStagingEmpty()
	if v, err := load("app", image); err != nil || v.Status != templates.Ready {
		t.Errorf("in the end: %+v, %v", v, err)
	}
}

// One tree, however it is packed, becomes one image; its version's digest is of
// what was sent.
func TestPackings(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	plain := archivetest.Tar(archivetest.Dir("d"), archivetest.Holding("d/f", strings.Repeat("contents", 5000)), archivetest.Symlink("s", "d/f"))
	images, digests := map[string]bool{}, map[string]bool{}
	for _, b := range [][]byte{
		plain, archivetest.Gzip(plain), archivetest.Zstd(plain), append(archivetest.Gzip(plain[:1000]), archivetest.Gzip(plain[1000:])...),
	} {
		v := r.push("app", b)
		images[v.ImageDigest], digests[v.Digest] = true, true
	}
	to := r.begin("app", "").upload()
	to.Format = "oci"
	b := archivetest.NewLayout(archivetest.Layer{Tar: plain}).Tar()
	v, err := r.Ingest(t.Context(), to, int64(len(b)), bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	images[v.ImageDigest], digests[v.Digest] = true, true
	if len(images) != 1 || len(digests) != 5 {
		t.Errorf("%d images, %d digests", len(images), len(digests))
	}
}

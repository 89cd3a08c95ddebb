package main_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
)

// TestPools: volumes in a second pool live as those in the first, from templates
// too; each pool accounts for its own; a pool that is not there keeps its volumes
// from use, and nobody else; a rebuild finds the volumes of all.
func TestPools(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	second := t.TempDir()
	n := newNode(t, "--pool", "second=sparse:"+second)
	ctx := t.Context()
	tree := t.TempDir()
	must(t, os.Mkdir(filepath.Join(tree, "bin"), 0o755))
	must(t, os.WriteFile(filepath.Join(tree, "bin/tool"), []byte(strings.Repeat("tool", 5000)), 0o755))
	n.push("tools", tree)
	for _, spec := range []client.VolumeSpec{
		{Size: 64, Pool: "second"}, {Size: 64, Pool: "second", Template: "tools"}, {Size: 400, Pool: "second", Template: "tools:1", Filesystem: "xfs"}, {Size: 64, Template: "tools"},
	} {
		name := spec.Pool + "-" + strings.ReplaceAll(spec.Template, ":", "-") + "x"
		v := n.create(strings.Trim(name, "-"), spec)
		if v.Spec.Pool != spec.Pool {
			t.Errorf("it is in pool %q, not %q", v.Spec.Pool, spec.Pool)
		}
	}
	images, err := filepath.Glob(filepath.Join(second, "pool", "images", "vol-*"))
	must(t, err)
	if len(images) != 3 {
		t.Errorf("%d images are in the second pool's directory", len(images))
	}
	_, err = n.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: "nowhere"}, Spec: client.VolumeSpec{Size: 16, Pool: "third"}}, "")
	if err == nil || !strings.Contains(err.Error(), "default, second") {
		t.Errorf("a create in a pool that is not there: %v", err)
	}
	pools, err := n.Pools(ctx)
	must(t, err)
	if len(pools) != 2 || pools[0].Volumes != 1 || pools[1].Volumes != 3 || pools[1].Name != "second" || pools[1].Provisioned != (64+64+400)<<20 {
		t.Errorf("pools: %+v", pools)
	}

	const name = "second-toolsx"
	at := filepath.Join(n.state, "attach", "there")
	must(t, os.MkdirAll(at, 0o755))
	use := func(want string) {
		t.Helper()
		a, err := n.Attach(ctx, name, client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}})
		must(t, err)
		if b, err := os.ReadFile(filepath.Join(at, "bin/tool")); err != nil || string(b) != want {
			t.Errorf("the file of the template: %d bytes, %v", len(b), err)
		}
		must(t, os.WriteFile(filepath.Join(at, "bin/tool"), []byte("used"), 0o644))
		_, err = n.Detach(ctx, name, a.ID)
		must(t, err)
	}
	use(strings.Repeat("tool", 5000))
	size := int64(128)
	grown, err := n.UpdateVolume(ctx, name, client.VolumeChange{SizeMiB: &size})
	must(t, err)
	if grown.Spec.Size != 128 {
		t.Errorf("grown: %+v", grown.Spec)
	}

	before := n.listing()
	n.stop()
	must(t, os.RemoveAll(filepath.Join(n.state, "meta", "store")))
	if code, out := command(t, holdfastd, append([]string{"rebuild", "--yes"}, n.args...)...); code != 0 {
		t.Fatalf("rebuild: exit code %d\n%s", code, out)
	}
	n.start()
	if after := n.listing(); after != before {
		t.Errorf("after the rebuild:\n%s\nbefore:\n%s", after, before)
	}
	use("used")

	n.stop()
	away := second + "-away"
	must(t, os.Rename(second, away))
	must(t, os.WriteFile(second, nil, 0o600)) // not a directory
	n.start()
	n.create("goes-on", client.VolumeSpec{Size: 16})
	_, err = n.Attach(ctx, name, client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}})
	if err == nil || !strings.Contains(err.Error(), "not available") {
		t.Errorf("an attach of a volume whose pool is not there: %v", err)
	}
	if pools, err = n.Pools(ctx); err != nil || len(pools) != 2 || pools[1].Unavailable == "" || pools[1].Volumes != 3 {
		t.Errorf("pools: %+v, %v", pools, err)
	}
	if n.metric(`holdfast_pool_state{pool="second",state="unavailable"}`) != "1" {
		t.Error("the metrics do not tell that a pool is not there")
	}
	if v, err := n.Volume(ctx, name); err != nil || v.Spec.Pool != "second" {
		t.Errorf("a volume whose pool is not there: %+v, %v", v.Spec, err)
	}
	n.stop()
	must(t, os.Remove(second))
	must(t, os.Rename(away, second))
	n.start()
	use("used")
	for _, v := range []string{name, "second-x"} {
		_, err := n.DeleteVolume(ctx, v)
		must(t, err)
	}
}

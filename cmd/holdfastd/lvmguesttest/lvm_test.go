package lvmguesttest_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/daemon"
	"holdfast/internal/tarball"
	"holdfast/internal/vmtest"
)

func TestMain(m *testing.M) {
	os.Exit(vmtest.MainWith(m, vmtest.Options{Disks: []int64{4 << 30, 4 << 30}}, blockd))
}

const blockd = "holdfast/cmd/holdfast-blockd"

const patience = 60 * time.Second

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sh(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// node is a daemon in this process.
type node struct {
	t      testing.TB
	root   string // on a disk of the guest
	config daemon.Config
	end    context.CancelFunc
	ended  chan error
	*client.Client
}

// newNode makes the group vg with the thin pool thin, and starts a daemon that has it
// as pool "thin"; its state is on an ext4 of its own.
func newNode(t *testing.T) *node {
	t.Helper()
	disks := vmtest.Disks()
	n := &node{t: t, root: t.TempDir()}
	sh(t, "mkfs.ext4 -q "+disks[0]+" && mount "+disks[0]+" "+n.root)
	t.Cleanup(func() { sh(t, "umount "+n.root) })
	sh(t, "vgcreate -qq -s 4m vg "+disks[1]+" && lvcreate -qq -y -L 1536m -T vg/thin")

	state := filepath.Join(n.root, "state")
	var err error
	n.config, err = daemon.Load(daemon.Sources{Flags: map[string]string{
		"state_dir": state, "listen": "none", "pool_size": "1GiB", "pool": "lvm:vg/thin", "worker": vmtest.Program(blockd),
		"host_prefixes": filepath.Join(n.root, "attach"), "tenants_attach": "true", "cage": "off", "rate_limit": "0", "backup_interval": "0", "log_level": "error",
	}})
	must(t, err)
	n.Client, err = client.New(client.Options{Socket: n.config.Socket, Workspace: "main"})
	must(t, err)
	t.Cleanup(n.remove)
	n.start()
	_, err = n.CreateWorkspace(t.Context(), "main")
	must(t, err)
	return n
}

func (n *node) start() {
	n.t.Helper()
	ctx, end := context.WithCancel(context.Background())
	n.end, n.ended = end, make(chan error, 1)
	go func() { n.ended <- daemon.Serve(ctx, n.config, io.Discard, n.t.Output()) }()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := n.Workspaces(ctx); err == nil || client.IsNotFound(err) { // before there is a workspace
			return
		}
		select {
		case err := <-n.ended:
			n.ended = nil
			n.t.Fatalf("the daemon ends: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			n.t.Fatal("the daemon does not answer")
		}
	}
}

func (n *node) stop() {
	n.t.Helper()
	if n.ended == nil {
		return
	}
	n.end()
	err := <-n.ended
	n.ended = nil
	n.Client.Close()
	must(n.t, err)
}

func (n *node) remove() {
	n.stop()
	if err := daemon.Uninstall(context.Background(), n.config, n.t.Output()); err != nil {
		n.t.Error(err)
	}
}

func (n *node) create(name string, spec client.VolumeSpec) client.Volume {
	n.t.Helper()
	v, err := n.CreateVolume(n.t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: spec}, "")
	must(n.t, err)
	return v
}

// push makes a template with one file, "tool".
func (n *node) push(name, content string) {
	n.t.Helper()
	tree := n.t.TempDir()
	must(n.t, os.WriteFile(filepath.Join(tree, "tool"), []byte(content), 0o755))
	plan, err := tarball.New(n.t.Context(), tree)
	must(n.t, err)
	archive := plan.Reader()
	defer archive.Close()
	_, err = n.PushTemplate(n.t.Context(), client.Push{Name: name, Archive: archive, Length: plan.Length()})
	must(n.t, err)
}

// attach attaches a volume to a directory of the guest.
func (n *node) attach(name string, readOnly bool) (at string, a client.Attachment, err error) {
	n.t.Helper()
	at = filepath.Join(n.root, "attach", name)
	must(n.t, os.MkdirAll(at, 0o755))
	a, err = n.Attach(n.t.Context(), name, client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}, ReadOnly: readOnly})
	return at, a, err
}

// use attaches a volume, lets do work in it, and detaches it.
func (n *node) use(name string, readOnly bool, do func(at string)) {
	n.t.Helper()
	at, a, err := n.attach(name, readOnly)
	must(n.t, err)
	do(at)
	_, err = n.Detach(n.t.Context(), name, a.ID)
	must(n.t, err)
}

// source is the device that is mounted at a directory.
func source(t testing.TB, at string) string {
	t.Helper()
	return sh(t, "awk -v at="+at+" '$2 == at { print $1 }' /proc/mounts")
}

// device is the logical volume that is mounted at a directory, its node.
func (n *node) device(at string) string {
	n.t.Helper()
	from := source(n.t, at)
	if !strings.HasPrefix(from, "/dev/") || strings.Contains(from, "loop") {
		n.t.Fatalf("%s is mounted from %q", at, from)
	}
	node := sh(n.t, "readlink -f "+from)
	if pool := sh(n.t, "lvs --noheadings -o pool_lv "+node); pool != "thin" {
		n.t.Fatalf("%s is mounted from %s, in pool %q", at, from, pool)
	}
	return node
}

// grow asks for a size in MiB and waits until all three sizes are there.
func (n *node) grow(name string, mib int64) {
	n.t.Helper()
	_, err := n.UpdateVolume(n.t.Context(), name, client.VolumeChange{SizeMiB: &mib})
	must(n.t, err)
	n.sizes(name, n.await(name, func(v client.Volume) bool { return v.State.Sizes.Pending == "" }), mib)
}

// extent is the group's, in MiB.
const extent = 4

// sizes checks what is told of a volume that somebody wants to have mib MiB.
func (n *node) sizes(name string, v client.Volume, mib int64) {
	n.t.Helper()
	s := v.State.Sizes
	if device := (mib + extent - 1) / extent * extent; v.Spec.Size != mib || s == nil || s.Wanted != mib<<20 || s.Device != device<<20 || s.Filesystem < mib<<20*9/10 || s.Filesystem > s.Device {
		n.t.Errorf("%s wants %d MiB: %+v, sizes %+v", name, mib, v.Spec, s)
	}
}

// await waits until a volume is as it should be.
func (n *node) await(name string, is func(client.Volume) bool) client.Volume {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		v, err := n.Volume(n.t.Context(), name)
		must(n.t, err)
		if is(v) {
			return v
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: %+v", name, v.State)
		}
	}
}

// move moves a volume and waits for its end.
func (n *node) move(name, pool string) {
	n.t.Helper()
	_, err := n.MoveVolume(n.t.Context(), name, pool)
	must(n.t, err)
	if v := n.await(name, func(v client.Volume) bool { return v.State.Move == nil }); v.Spec.Pool != strings.TrimPrefix(pool, "default") {
		n.t.Errorf("moved to %s: it is in %q", pool, v.Spec.Pool)
	}
}

// holds checks a file of an attached volume.
func holds(t testing.TB, at, file string, want []byte) {
	t.Helper()
	if got, err := os.ReadFile(filepath.Join(at, file)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes, want %d; %v", file, len(got), len(want), err)
	}
}

// listing is all volumes as the API shows them, without what is not kept.
func (n *node) listing() string {
	n.t.Helper()
	var all []client.Volume
	for v, err := range n.Volumes(n.t.Context(), client.VolumeQuery{Sort: "name:asc"}) {
		must(n.t, err)
		v, err := n.Volume(n.t.Context(), v.Metadata.Name)
		must(n.t, err)
		v.State.Sizes.Allocated, v.State.Sizes.Shared = 0, 0
		all = append(all, v)
	}
	b, err := json.MarshalIndent(all, "", " ")
	must(n.t, err)
	return string(b)
}

// foreign makes volumes in the same pool that are not ours, one by a name of ours, and
// says what they hold.
func foreign(t testing.TB) (digest func() string) {
	const impostor = "hfi-vol-00000000000000000000000000"
	for _, name := range []string{"foreign", impostor} {
		sh(t, "lvcreate -qq -y -V 8m -T vg/thin -n "+name+" && dd if=/dev/urandom of=/dev/vg/"+name+" bs=1M count=8 2>/dev/null && sync")
	}
	return func() string { return sh(t, "sha256sum /dev/vg/foreign /dev/vg/"+impostor) }
}

// TestVolumes is the life of volumes in a thin pool, from their creation to the pool's
// end, with others' volumes beside them.
func TestVolumes(t *testing.T) {
	n := newNode(t)
	digest := foreign(t)
	others := digest()
	used := func() string { return sh(t, "lvs --noheadings -o data_percent vg/thin") }
	empty := used()
	tool := []byte(strings.Repeat("tool", 5000))
	names := []string{"blank", "made", "xfs"}

	t.Run("create", func(t *testing.T) {
		n.t = t
		n.push("tools", string(tool))
		n.sizes("blank", n.create("blank", client.VolumeSpec{Size: 66, Pool: "thin"}), 66)
		n.create("xfs", client.VolumeSpec{Size: 320, Pool: "thin", Filesystem: "xfs"})
		n.sizes("made", n.create("made", client.VolumeSpec{Size: 64, Pool: "thin", Template: "tools"}), 64)
	})
	t.Run("attach", func(t *testing.T) {
		n.t = t
		for _, name := range names {
			n.use(name, false, func(at string) {
				n.device(at)
				must(t, os.WriteFile(filepath.Join(at, "file"), []byte(name), 0o600))
				if name == "made" {
					holds(t, at, "tool", tool)
				}
			})
		}
	})
	t.Run("grow", func(t *testing.T) {
		n.t = t
		n.use("blank", false, func(at string) {
			n.grow("blank", 130)
			holds(t, at, "file", []byte("blank"))
		})
		n.use("xfs", false, func(string) { n.grow("xfs", 350) })
		n.grow("made", 98)
		n.use("made", false, func(at string) { holds(t, at, "tool", tool) })
	})
	t.Run("read-only", func(t *testing.T) {
		n.t = t
		n.use("made", true, func(at string) {
			holds(t, at, "file", []byte("made"))
			if err := os.WriteFile(filepath.Join(at, "file"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
				t.Errorf("a write to a file of a read-only attachment: %v", err)
			}
			device := n.device(at)
			f, err := os.OpenFile(device, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("written"), 0)
				err = errors.Join(err, f.Sync(), f.Close())
			}
			if err == nil {
				t.Errorf("%s takes writes under a read-only attachment", device)
			}
		})
	})
	t.Run("export", func(t *testing.T) {
		n.t = t
		a, err := n.Attach(t.Context(), "xfs", client.Attachment{Holder: "agent:backup", Target: client.Target{Type: "export", Protocol: "nbd"}, Limits: &client.RateLimits{WriteIOPS: 20}})
		must(t, err)
		n.bounded(t, "xfs", a)
		c := blockdevtest.DialNBD(t, a.Socket)
		want, got := bytes.Repeat([]byte("exported"), 512), make([]byte, 4096)
		_, err = c.WriteAt(want, 300<<20)
		must(t, err)
		n.stop()
		n.start()
		if _, err := c.ReadAt(got, 300<<20); err != nil || !bytes.Equal(got, want) {
			t.Errorf("after the daemon was started again the client reads %x, %v", got[:8], err)
		}
		mib := int64(400)
		_, err = n.UpdateVolume(t.Context(), "xfs", client.VolumeChange{SizeMiB: &mib})
		must(t, err)
		larger := blockdevtest.DialNBD(t, a.Socket)
		_, err = larger.WriteAt(want, 399<<20)
		must(t, errors.Join(err, larger.Close()))
		if _, err := n.Detach(t.Context(), "xfs", a.ID); client.Status(err) != 409 {
			t.Errorf("detached under a client: %v", err)
		}
		must(t, c.Close())
		_, err = n.Detach(t.Context(), "xfs", a.ID)
		must(t, err)
	})
	t.Run("rebuild", func(t *testing.T) {
		n.t = t
		at, a, err := n.attach("made", false)
		must(t, err)
		before := n.listing()
		n.stop()
		must(t, os.WriteFile(filepath.Join(at, "meanwhile"), []byte("kept"), 0o600))
		must(t, os.RemoveAll(filepath.Join(n.config.StateDir, "meta", "store")))
		must(t, daemon.Rebuild(t.Context(), n.config, "", t.Output(), t.Output()))
		n.start()
		n.same(before)
		_, err = n.Detach(t.Context(), "made", a.ID)
		must(t, err)
	})
	t.Run("move", func(t *testing.T) {
		n.t = t
		n.create("wanderer", client.VolumeSpec{Size: 66, Template: "tools"})
		content := make([]byte, 24<<20)
		_, _ = rand.NewChaCha8(sha256.Sum256([]byte("move"))).Read(content)
		n.use("wanderer", false, func(at string) { must(t, os.WriteFile(filepath.Join(at, "data"), content, 0o600)) })
		for _, pool := range []string{"thin", "default"} {
			n.move("wanderer", pool)
			n.use("wanderer", false, func(at string) {
				if pool == "thin" {
					n.device(at)
				}
				holds(t, at, "data", content)
				holds(t, at, "tool", tool)
			})
		}
	})
	t.Run("without the pool", func(t *testing.T) {
		n.t = t
		before := n.listing()
		n.stop()
		sh(t, "lvm vgrename -qq vg away")
		n.start()
		_, _, attach := n.attach("made", false)
		larger := int64(200)
		_, grow := n.UpdateVolume(t.Context(), "made", client.VolumeChange{SizeMiB: &larger})
		_, move := n.MoveVolume(t.Context(), "wanderer", "thin")
		_, create := n.CreateVolume(t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: "new"}, Spec: client.VolumeSpec{Size: 16, Pool: "thin"}}, "")
		for what, err := range map[string]error{"attach": attach, "grow": grow, "move": move, "create": create} {
			if client.Status(err) != 503 || !strings.Contains(err.Error(), "not available") || !strings.Contains(err.Error(), `"thin"`) {
				t.Errorf("%s, while the pool is not there: %v", what, err)
			}
		}
		n.create("goes-on", client.VolumeSpec{Size: 16})
		_, err := n.DeleteVolume(t.Context(), "goes-on")
		must(t, err)
		if pools, err := n.Pools(t.Context()); err != nil || len(pools) != 2 || pools[1].Unavailable == "" {
			t.Errorf("pools: %+v, %v", pools, err)
		}
		n.stop()
		sh(t, "lvm vgrename -qq away vg")
		n.start()
		n.same(before)
		n.use("made", false, func(at string) { holds(t, at, "meanwhile", []byte("kept")) })
	})
	t.Run("delete", func(t *testing.T) {
		n.t = t
		for _, name := range append(names, "wanderer") {
			_, err := n.DeleteVolume(t.Context(), name)
			must(t, err)
		}
		_, err := n.DeleteTemplate(t.Context(), "tools")
		must(t, err)
		ours := func() string {
			return sh(t, "lvs --noheadings -o lv_name -S 'lv_tags!=\"\" && lv_name!=hf-meta-thin' vg")
		}
		for deadline := time.Now().Add(patience); ours() != ""; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("these are left: %s", ours())
			}
		}
		if now := used(); now != empty {
			t.Errorf("of the pool %s %% are in use, %s %% were before", now, empty)
		}
	})
	if now := digest(); now != others {
		t.Errorf("others' volumes have become\n%s\nand were\n%s", now, others)
	}
}

// bounded checks that limits of 20 writes a second hold for an export of a volume, beyond
// the daemon's life, that they are told of, and that they are changed and lifted under
// a client.
func (n *node) bounded(t *testing.T, name string, a client.Attachment) {
	t.Helper()
	ctx, c := t.Context(), blockdevtest.DialNBD(t, a.Socket)
	write := func(bytes int) error { _, err := c.WriteAt(make([]byte, bytes), 310<<20); return err }
	seen := func() (client.VolumeIO, *client.Worker) {
		t.Helper()
		io, err := n.IO(ctx, name)
		must(t, err)
		if io.Worker == nil {
			t.Fatalf("no worker serves it: %+v", io)
		}
		return io, io.Worker
	}
	if a.Limits == nil || a.Limits.WriteIOPS != 20 || a.Enforcement == nil || a.Enforcement.Mechanism == "" {
		t.Errorf("attached with %+v, %+v", a.Limits, a.Enforcement)
	}
	n.stop()
	begin := time.Now()
	for range 25 {
		must(t, write(4096))
	}
	// Two pass at once, a tenth of a second's worth, and one begins.
	if took := time.Since(begin); took < (25-3)*time.Second/20 {
		t.Errorf("25 writes took %v at 20 a second", took)
	}
	n.start()
	if _, w := seen(); w.Limits == nil || *w.Limits != (client.RateLimits{WriteIOPS: 20}) || w.Requests["write"].Requests != 25 || w.Waiting["throttle"].Seconds <= 0 {
		t.Errorf("under its limits: %+v, waited %+v, served %+v", w.Limits, w.Waiting["throttle"], w.Requests["write"])
	}

	slow := client.RateLimits{WriteBytes: 64 << 10}
	_, err := n.SetLimits(ctx, name, a.ID, slow)
	must(t, err)
	must(t, write(16<<20)) // and goes into debt for minutes
	held := make(chan error, 1)
	go func() { held <- write(4096) }()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		io, w := seen()
		if w.Waiting["throttle"].Now == 1 {
			if w.Limits == nil || *w.Limits != slow || io.Waits[0].Cause != "throttle" || io.Waits[0].Requests != 1 {
				t.Errorf("with a write that is held back: limits %+v, waits %+v", w.Limits, io.Waits)
			}
			break
		}
		select {
		case err := <-held:
			t.Fatalf("a write has ended that was to be held back: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing is held back: %+v", w)
		}
	}
	lifted, err := n.SetLimits(ctx, name, a.ID, client.RateLimits{})
	must(t, err)
	select {
	case err := <-held:
		must(t, err)
	case <-time.After(patience):
		t.Fatal("a write is held back by limits that are lifted")
	}
	if _, w := seen(); lifted.Limits != nil || w.Limits != nil || w.Waiting["throttle"].Now != 0 {
		t.Errorf("without limits: %+v, %+v, waiting %+v", lifted.Limits, w.Limits, w.Waiting["throttle"])
	}
	must(t, c.Close())
}

// same checks that all volumes are listed as before.
func (n *node) same(before string) {
	n.t.Helper()
	if after := n.listing(); after != before {
		n.t.Errorf("listed is\n%s\nand was\n%s", after, before)
	}
}

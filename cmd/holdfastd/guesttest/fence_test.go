package guesttest_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/api/client"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/blockdev/attach/vmmtest"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/localdaemon"
	"holdfast/internal/vmtest"
)

func TestMain(m *testing.M) {
	vmmtest.Main() // a VMM of a test is this program, too
	var err error
	if built, err = os.MkdirTemp("", "holdfast-guesttest-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(built)
	os.Exit(code)
}

// mix is one of everything that a volume can be attached to.
type mix struct {
	d     *localdaemon.Daemon
	fc    *vmmtest.VMM // keeps its drives until it ends
	kinds []string
	to    map[string]func() client.Attachment
}

func newMix(t *testing.T) *mix {
	t.Helper()
	box, guest := runctest.Start(t, runctest.Options{}), vmtest.Start(t, vmtest.Options{})
	fc, ch := vmmtest.Socket(t), vmmtest.Socket(t)
	microVM := vmmtest.Start(t, vmmtest.Firecracker, fc)
	vm := vmmtest.Start(t, vmmtest.CloudHypervisor, ch)
	vm.Steer("create")
	vm.Steer("boot")
	d := startArgs(t, "--vm-sockets", strings.Join([]string{guest.Dir, filepath.Dir(fc), filepath.Dir(ch)}, ","), "--runc-roots", box.Root)
	target := func(holder string, t client.Target) func() client.Attachment {
		return func() client.Attachment { return client.Attachment{Holder: "sandbox:" + holder, Target: t} }
	}
	return &mix{d: d, fc: microVM, kinds: []string{"host", "runc", "hot", "cold", "firecracker", "cloud-hypervisor"}, to: map[string]func() client.Attachment{
		"host": target("host", client.Target{Type: "host", Path: filepath.Join(d.State, "attach", "mix")}),
		"runc": func() client.Attachment {
			return client.Attachment{Holder: "sandbox:runc", MountPath: "/data", Target: client.Target{Type: "runc", Container: box.ID, Root: box.Root}}
		},
		"hot":              target("hot", client.Target{Type: "qemu", Socket: guest.Monitor}),
		"cold":             target("cold", client.Target{Type: "vm", VMM: "qemu"}),
		"firecracker":      target("firecracker", client.Target{Type: "firecracker", Socket: fc}),
		"cloud-hypervisor": target("cloud-hypervisor", client.Target{Type: "cloud-hypervisor", Socket: ch}),
	}}
}

func (m *mix) create(t *testing.T, name string) {
	t.Helper()
	_, err := m.d.Client.CreateVolume(t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Size: 16}}, "")
	must(t, err)
}

// image finds a volume's in the pool.
func (m *mix) image(t *testing.T, name string) string {
	t.Helper()
	var found string
	must(t, filepath.WalkDir(m.d.State, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "description.json" {
			if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), `"name":"`+name+`"`) {
				found = filepath.Join(filepath.Dir(path), "image")
			}
		}
		return nil
	}))
	if found == "" {
		t.Fatalf("volume %s has no image below %s", name, m.d.State)
	}
	return found
}

// openers are the processes that have a file open.
func openers(t *testing.T, path string) []int {
	t.Helper()
	var want, got syscall.Stat_t
	must(t, syscall.Stat(path, &want))
	var found []int
	all, err := filepath.Glob("/proc/[0-9]*/fd/*")
	must(t, err)
	for _, fd := range all {
		if syscall.Stat(fd, &got) == nil && got.Dev == want.Dev && got.Ino == want.Ino {
			var pid int
			if _, err := fmt.Sscanf(fd, "/proc/%d/", &pid); err == nil && !slices.Contains(found, pid) {
				found = append(found, pid)
			}
		}
	}
	return found
}

// conflict is nil for a 409.
func conflict(err error) error {
	var e *client.Error
	if errors.As(err, &e) && e.Status == 409 {
		return nil
	}
	return fmt.Errorf("want a conflict, got %w", errors.Join(err, errors.New("no refusal")))
}

// TestOneWriterInAnyMix: whoever has a volume, as a writer or a reader, nobody gets it
// to write, and beside a writer nobody reads.
func TestOneWriterInAnyMix(t *testing.T) {
	blockdevtest.LeakCheck(t)
	m := newMix(t)
	ctx, c := t.Context(), m.d.Client
	for _, holder := range m.kinds {
		for _, readOnly := range []bool{true, false} {
			name := fmt.Sprintf("%s-%t", holder, readOnly)
			m.create(t, name)
			first := m.to[holder]()
			first.ReadOnly = readOnly
			a, err := c.Attach(ctx, name, first)
			must(t, err)
			for _, other := range m.kinds {
				for _, reads := range []bool{false, true} {
					second := m.to[other]()
					second.ReadOnly, second.Holder = reads, "sandbox:second"
					if readOnly && reads { // readers beside readers are fine
						continue
					}
					if _, err := c.Attach(ctx, name, second); conflict(err) != nil {
						t.Errorf("%s (reads: %t) beside %s (reads: %t): %v", other, reads, holder, readOnly, conflict(err))
					}
				}
			}
			v, err := c.Volume(ctx, name)
			must(t, err)
			if len(v.State.Attachments) != 1 || v.State.Attachments[0].ID != a.ID || v.State.Attachments[0].Phase != "attached" {
				t.Errorf("%s: %+v", name, v.State.Attachments)
			}
			if holder == "firecracker" {
				continue // it takes no drive back; its end releases both
			}
			_, err = c.Detach(ctx, name, a.ID)
			must(t, err)
		}
	}
	m.fc.Kill()
	for _, name := range []string{"firecracker-true", "firecracker-false"} {
		await(t, c, name, func(v client.Volume) bool { return len(v.State.Attachments) == 0 })
	}
}

// TestForceGoesUpward: by force from one to the next, whatever it is: each time the
// epoch is higher, one has the volume, and no process of those before has its image.
func TestForceGoesUpward(t *testing.T) {
	blockdevtest.LeakCheck(t)
	m := newMix(t)
	ctx, c := t.Context(), m.d.Client
	m.create(t, "v")
	var epoch uint64
	var stale []string
	for _, kind := range []string{"host", "runc", "hot", "cold", "firecracker", "cloud-hypervisor", "cold"} {
		want := m.to[kind]()
		want.Force = true
		a, err := c.Attach(ctx, "v", want)
		if err != nil {
			t.Fatalf("to %s: %v", kind, err)
		}
		if a.Epoch <= epoch {
			t.Errorf("%s has epoch %d after %d", kind, a.Epoch, epoch)
		}
		epoch = a.Epoch
		if v, err := c.Volume(ctx, "v"); err != nil || len(v.State.Attachments) != 1 {
			t.Errorf("%s: %+v, %v", kind, v.State.Attachments, err)
		}
		holders := openers(t, m.image(t, "v"))
		if kind == "cold" {
			if len(holders) > 0 {
				t.Errorf("processes %v of those before still have the image", holders)
			}
			stale = append(stale, a.Launch.Path)
			run(t, a.Launch.Path)
		} else if len(holders) > 1 {
			t.Errorf("%s: processes %v have the image", kind, holders)
		}
	}
	if _, err := os.Stat(stale[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the path of an attachment that was ended by force: %v", err)
	}
	v, err := c.Volume(ctx, "v")
	must(t, err)
	_, err = c.ForceDetach(ctx, "v", v.State.Attachments[0].ID)
	must(t, err)
	if holders := openers(t, m.image(t, "v")); len(holders) > 0 {
		t.Errorf("processes %v still have the image", holders)
	}
}

// run starts a process that has a file open, as a machine has.
func run(t *testing.T, path string) *exec.Cmd {
	t.Helper()
	c := exec.Command("sh", "-c", `exec 3<>"$0" && echo && exec sleep 1000`, path)
	out, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	_, err = out.Read(make([]byte, 1))
	must(t, err)
	return c
}

// lockBeside tries the lock beside an image, as another daemon or tool would.
func lockBeside(t *testing.T, image string) error {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(filepath.Dir(image), "lock"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
}

// TestLockBesideTheImage: while the daemon lives nobody else takes an attached image;
// after its death the kernel is asked who has it, also for what no record tells.
func TestLockBesideTheImage(t *testing.T) {
	blockdevtest.LeakCheck(t)
	d := startArgs(t)
	m := &mix{d: d}
	ctx, c := t.Context(), d.Client
	m.create(t, "v")
	a, err := c.Attach(ctx, "v", toStart("sandbox:one", ""))
	must(t, err)
	image := m.image(t, "v")
	vm := run(t, a.Launch.Path)
	locked := func(when string) {
		t.Helper()
		if err := lockBeside(t, image); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("%s: the lock beside the image: %v", when, err)
		}
	}
	locked("attached")

	program, err := daemonProgram()
	must(t, err)
	bounded, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := exec.CommandContext(bounded, program, "--dev", "--state-dir", d.State, "--listen", "none").CombinedOutput()
	if err == nil || bounded.Err() != nil {
		t.Errorf("a second daemon: %v\n%s", err, out)
	}

	must(t, d.Kill())
	if err := lockBeside(t, image); err != nil {
		t.Errorf("after its death: %v", err)
	}
	must(t, d.Restart(ctx))
	c = d.Client
	locked("after a restart")
	_, err = c.Attach(ctx, "v", toStart("sandbox:two", ""))
	refused(t, err, "VOLUME_ATTACHED", "sandbox:one")
	_, err = c.Detach(ctx, "v", a.ID)
	refused(t, err, "CONFLICT", fmt.Sprintf("process %d has it open", vm.Process.Pid))
	must(t, vm.Process.Kill())
	_ = vm.Wait()
	await(t, c, "v", func(v client.Volume) bool { return len(v.State.Attachments) == 0 })

	byHand := run(t, image) // what nobody has told the daemon of
	for _, force := range []bool{false, true} {
		again := toStart("sandbox:two", "")
		again.Force = force
		_, err = c.Attach(ctx, "v", again)
		refused(t, err, "CONFLICT", fmt.Sprintf("process %d has the image", byHand.Process.Pid))
	}
	must(t, byHand.Process.Kill())
	_ = byHand.Wait()
	if b, err := c.Attach(ctx, "v", toStart("sandbox:two", "")); err != nil || b.Epoch <= a.Epoch {
		t.Errorf("%+v, %v", b, err)
	}
}

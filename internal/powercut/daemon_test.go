package powercut_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/powercut"
)

const (
	// diskSize is the rig's filesystem: room for a pool and the records' image.
	diskSize = 6 << 30
	// patience bounds the waiting for a daemon.
	patience = 60 * time.Second
	// tasks is how many volumes each of the writers goes through.
	tasks = 6
)

// TestAcknowledgedSurvivesPowerCuts runs the real daemon with everything that
// it keeps on the rig, lets several clients change things at once, and cuts the
// power: what was acknowledged by then is there, whatever else was under way.
func TestAcknowledgedSurvivesPowerCuts(t *testing.T) {
	blockdevtest.LeakCheck(t)
	rig := powercut.Start(t, diskSize)
	program, mounts := build(t), t.TempDir()
	d := start(t, program, filepath.Join(rig.Dir, "state"), mounts)
	j := &journal{rig: rig, mounts: mounts, objects: map[string][]fact{}}
	ready := rig.Mark()
	work(t, d.client(t), j)
	d.kill(t)
	rig.Stop(t)

	// Right after an acknowledgement a missing flush shows best; other moments
	// fall into the middle of something, the first ones into the making of the
	// state directory.
	moments := slices.Concat(rig.Moments(0, ready, 5, 1), rig.Moments(ready, rig.Mark(), 10, 2), j.acknowledged(12))
	slices.Sort(moments)
	for i, at := range slices.Compact(moments) {
		seed := uint64(i % 2 * (i + 1)) // every other time a subset of the writes is lost
		t.Run(fmt.Sprintf("%d-%d", at, seed), func(t *testing.T) {
			dir := rig.Rebuild(t, at, seed)
			state := filepath.Join(dir, "state")
			if at >= ready && i%4 == 3 { // the records are lost as well
				rebuild(t, program, state)
			}
			j.inspect(t, start(t, program, state, mounts), at)
			rig.Discard(t, dir)
		})
	}
}

func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "holdfastd")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", program, "holdfast/cmd/holdfastd")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// process is a running daemon.
type process struct {
	cmd  *exec.Cmd
	dir  string
	log  string
	done chan struct{} // closed when it has ended
}

// start starts a daemon and waits until it serves.
func start(t *testing.T, program, dir, mounts string) *process {
	t.Helper()
	p := &process{dir: dir, log: filepath.Join(t.TempDir(), "log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.cmd = exec.Command(program, "--dev", "--state-dir", dir, "--listen", "127.0.0.1:0", "--rate-limit", "0", "--host-prefixes", mounts)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // killed, always
		close(p.done)
	}()
	t.Cleanup(func() { p.kill(t) })
	c := p.client(t)
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		_, err := c.ListVolumes(t.Context(), client.VolumeQuery{Limit: 1})
		if err == nil {
			return p
		}
		select {
		case <-p.done:
			t.Fatalf("the daemon ended:\n%s", p.tail())
		default:
		}
		// 404: the workspace of --dev is made once the socket is there.
		early := []int{0, http.StatusServiceUnavailable, http.StatusNotFound}
		if time.Now().After(deadline) || !slices.Contains(early, client.Status(err)) {
			t.Fatalf("the daemon does not answer: %v\n%s", err, p.tail())
		}
	}
}

// rebuild makes new records from what the state directory says of itself.
func rebuild(t *testing.T, program, dir string) {
	t.Helper()
	cmd := exec.Command(program, "rebuild", "--yes", "--dev", "--state-dir", dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("rebuild: %v\n%s", err, out)
	}
	if !strings.Contains(string(out), "/store.before-rebuild-") {
		t.Errorf("rebuild did not put the old records aside:\n%s", out)
	}
}

func (p *process) tail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4096):])
}

// kill ends the daemon as a power cut does, without a word.
func (p *process) kill(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	<-p.done
}

func (p *process) client(t *testing.T) *client.Client {
	t.Helper()
	c, err := client.New(client.Options{Socket: filepath.Join(p.dir, "holdfastd.sock"), Workspace: "main"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// fact is a state that one object was to have from some moment of [begin, end]
// on: begin was before the request, end after the answer.
type fact struct {
	begin, end powercut.Moment
	state      string
}

// journal is what the clients have been told, for each object in order.
type journal struct {
	rig    *powercut.Rig
	mounts string // where volumes are attached

	mu      sync.Mutex
	objects map[string][]fact
}

// note does something that gives an object a new state. A request that fails is
// the test's failure.
func (j *journal) note(t *testing.T, object string, do func() (state string, err error)) bool {
	begin := j.rig.Mark()
	state, err := do()
	end := j.rig.Mark()
	if err != nil {
		t.Errorf("%s: %v", object, err)
		return false
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.objects[object] = append(j.objects[object], fact{begin, end, state})
	return true
}

// acknowledged picks n of the moments at which something was acknowledged.
func (j *journal) acknowledged(n int) []powercut.Moment {
	var all []powercut.Moment
	for _, facts := range j.objects {
		for _, f := range facts {
			all = append(all, f.end)
		}
	}
	slices.Sort(all)
	random := rand.New(rand.NewPCG(3, 0))
	random.Shuffle(len(all), func(a, b int) { all[a], all[b] = all[b], all[a] })
	return all[:min(n, len(all))]
}

// possible tells the states that an object may have after a cut: the last one
// acknowledged, or one that was under way.
func possible(facts []fact, at powercut.Moment) []string {
	states := []string{absent}
	for _, f := range facts {
		switch {
		case f.end <= at:
			states = []string{f.state}
		case f.begin <= at:
			states = append(states, f.state)
		}
	}
	return states
}

const absent = "absent"

// inspect checks a daemon that was started after a cut, and ends it.
func (j *journal) inspect(t *testing.T, d *process, at powercut.Moment) {
	t.Helper()
	j.check(t, d.client(t), at)
	d.kill(t)
	if t.Failed() {
		t.Log(d.tail())
	}
}

// check compares what a daemon knows after a cut with the journal.
func (j *journal) check(t *testing.T, c *client.Client, at powercut.Moment) {
	t.Helper()
	sure := 0
	for _, object := range slices.Sorted(maps.Keys(j.objects)) {
		want := possible(j.objects[object], at)
		got, err := j.look(t.Context(), c, object)
		if err != nil {
			t.Errorf("%s: %v; it should be one of %q", object, err, want)
			continue
		}
		if !slices.Contains(want, got) {
			t.Errorf("%s is %q; it should be one of %q", object, got, want)
		}
		if len(want) == 1 && want[0] != absent {
			sure++
		}
	}
	t.Logf("%d objects were acknowledged", sure)
	pools, err := c.Pools(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pools {
		if len(p.Quarantined) > 0 {
			t.Errorf("a power cut left something that nothing explains: %+v", p.Quarantined)
		}
	}
}

// look reads the state of an object: "volume NAME", "template NAME", "key ID",
// or "file VOLUME PATH".
func (j *journal) look(ctx context.Context, c *client.Client, object string) (string, error) {
	part := strings.Fields(object)
	switch part[0] {
	case "volume":
		v, err := c.Volume(ctx, part[1])
		if client.IsNotFound(err) {
			return absent, nil
		}
		return describe(v), err
	case "template":
		v, err := c.Template(ctx, part[1])
		if client.IsNotFound(err) || err == nil && v.State.LatestVersion == "" {
			return absent, nil // or its first version was still under way
		}
		return v.State.LatestVersion, err
	case "key":
		keys, err := c.Keys(ctx)
		for _, k := range keys {
			if k.ID == part[1] {
				return keyState(k), err
			}
		}
		return absent, err
	default:
		return j.readFile(ctx, c, part[1], part[2])
	}
}

func describe(v client.Volume) string {
	return fmt.Sprintf("%s %d MiB %s %v", v.Spec.Filesystem, v.Spec.Size, v.Status, v.Metadata.Labels)
}

func keyState(k client.Key) string {
	if k.RevokedAt.IsZero() {
		return "valid"
	}
	return "revoked"
}

func digest(content string) string {
	if len(content) == 0 {
		return "empty"
	}
	return fmt.Sprintf("%d bytes, %.10x", len(content), sha256.Sum256([]byte(content)))
}

// readFile tells of a file of a volume, which it takes from its sandbox first: the
// machine that the sandbox was on has lost its power.
func (j *journal) readFile(ctx context.Context, c *client.Client, volume, file string) (string, error) {
	attachments, err := c.Attachments(ctx, volume)
	if client.IsNotFound(err) {
		return absent, nil
	}
	for _, a := range attachments {
		if _, err := c.Detach(ctx, volume, a.ID); err != nil && !client.IsNotFound(err) {
			return "", err
		}
	}
	var b bytes.Buffer
	err = c.ReadFile(ctx, volume, file, &b)
	if client.IsConflict(err) {
		// Its detach was cut short: the next mount recovers the filesystem.
		a, failed := c.Attach(ctx, volume, client.Attachment{Holder: "sandbox:doctor", Target: client.Target{Type: "host", Path: filepath.Join(j.mounts, volume)}})
		if failed == nil {
			_, failed = c.Detach(ctx, volume, a.ID)
		}
		if failed != nil {
			return "", errors.Join(err, failed)
		}
		err = c.ReadFile(ctx, volume, file, &b)
	}
	if client.IsNotFound(err) {
		return absent, nil
	}
	return digest(b.String()), err
}

// work lets several clients change things at once.
func work(t *testing.T, c *client.Client, j *journal) {
	t.Helper()
	var group sync.WaitGroup
	for _, job := range []func(){
		func() { lives(t, c, j, "one", "ext4", 16) },
		func() { lives(t, c, j, "two", "xfs", 300) },
		func() { writes(t, c, j) },
		func() { pushes(t, c, j) },
		func() { keys(t, c, j) },
	} {
		group.Go(job)
	}
	group.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// lives creates, changes, grows and deletes volumes.
func lives(t *testing.T, c *client.Client, j *journal, prefix, filesystem string, size int64) {
	for i := range tasks {
		name := fmt.Sprintf("%s-%d", prefix, i)
		change := func(ch client.VolumeChange) func() (string, error) {
			return func() (string, error) {
				v, err := c.UpdateVolume(t.Context(), name, ch)
				return describe(v), err
			}
		}
		larger := size + 8
		ok := j.note(t, "volume "+name, func() (string, error) {
			v, err := c.CreateVolume(t.Context(), client.Volume{
				Metadata: client.VolumeMetadata{Name: name},
				Spec:     client.VolumeSpec{Size: size, Filesystem: filesystem},
			}, "")
			return describe(v), err
		}) &&
			j.note(t, "volume "+name, change(client.VolumeChange{Labels: map[string]string{"round": fmt.Sprint(i)}})) &&
			j.note(t, "volume "+name, change(client.VolumeChange{SizeMiB: &larger}))
		if ok && i%3 == 1 {
			j.note(t, "volume "+name, func() (string, error) {
				_, err := c.DeleteVolume(t.Context(), name)
				return absent, err
			})
		}
	}
}

// writes is a sandbox that writes to its volume and is told by fsync that the
// data are there.
func writes(t *testing.T, c *client.Client, j *journal) {
	ctx := t.Context()
	for i := range tasks {
		name := fmt.Sprintf("data-%d", i)
		mount := filepath.Join(j.mounts, name)
		if _, err := c.CreateVolume(ctx, client.Volume{
			Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Size: 16},
		}, ""); err != nil {
			t.Error(err)
			return
		}
		a, err := c.Attach(ctx, name, client.Attachment{
			Holder: "sandbox:box", Target: client.Target{Type: "host", Path: mount},
		})
		if err != nil {
			t.Error(err)
			return
		}
		content := strings.Repeat(name+" was written\n", 3000)
		j.note(t, "file "+name+" /dir/data", func() (string, error) { return digest(content), save(mount, content) })
		if i%2 == 0 { // the others are still attached when the power goes
			if _, err := c.Detach(ctx, name, a.ID); err != nil {
				t.Error(err)
			}
		}
	}
}

// save writes dir/data below a directory so that it appears whole or not at all.
func save(mount, content string) error {
	dir := filepath.Join(mount, "dir")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, "data.new"))
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, "data")); err != nil {
		return err
	}
	for _, d := range []string{dir, mount} {
		f, err := os.Open(d)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// pushes uploads versions of a template and makes volumes of them.
func pushes(t *testing.T, c *client.Client, j *journal) {
	ctx := t.Context()
	for i := range tasks / 2 {
		content := strings.Repeat(fmt.Sprintf("version %d\n", i+1), 2000)
		archive := archiveOf(t, "etc/release", content)
		volume := fmt.Sprintf("from-%d", i)
		ok := j.note(t, "template demo", func() (string, error) {
			v, err := c.PushTemplate(ctx, client.Push{Name: "demo", DefaultSize: 32, Archive: bytes.NewReader(archive), Length: int64(len(archive))})
			return v.State.LatestVersion, err
		}) && j.note(t, "file "+volume+" /etc/release", func() (string, error) {
			_, err := c.CreateVolume(ctx, client.Volume{
				Metadata: client.VolumeMetadata{Name: volume}, Spec: client.VolumeSpec{Size: 32, Template: "demo:latest"},
			}, "")
			return digest(content), err
		})
		if !ok {
			return
		}
	}
}

func archiveOf(t *testing.T, name, content string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(1e9, 0)})
	_, writeErr := w.Write([]byte(content))
	if err := errors.Join(err, writeErr, w.Close()); err != nil {
		t.Error(err)
	}
	return b.Bytes()
}

// keys makes and revokes API keys.
func keys(t *testing.T, c *client.Client, j *journal) {
	for range tasks {
		begin := j.rig.Mark()
		k, err := c.CreateKey(t.Context(), client.NewKey{Name: "robot", Workspace: "main", Role: "writer"})
		if err != nil {
			t.Error(err)
			return
		}
		j.note(t, "key "+k.ID, func() (string, error) { return keyState(k.Key), nil })
		j.mu.Lock()
		j.objects["key "+k.ID][0].begin = begin
		j.mu.Unlock()
		j.note(t, "key "+k.ID, func() (string, error) {
			k, err := c.RevokeKey(t.Context(), k.ID)
			return keyState(k), err
		})
	}
}

package sandbox_test

import (
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/api/client"
)

// TestOutlivesTheDaemon: whatever ends the daemon, the sandbox, what runs in it
// and its volumes go on, and the next daemon finds them.
func TestOutlivesTheDaemon(t *testing.T) {
	r := start(t)
	r.volume("data", 16)
	made := r.box("web", at("/data", "data"), scratch("/scratch"))
	r.sh("web", "echo kept > /scratch/f; (while :; do echo x >> /data/ticks; sleep 0.02; done) >/dev/null 2>&1 &")
	ticks := func() int {
		n, err := strconv.Atoi(strings.TrimSpace(r.sh("web", "wc -l < /data/ticks")))
		r.must(err)
		return n
	}
	ids := fmt.Sprint(r.boxes())
	for name, stop := range map[string]func() error{"stopped": r.Stop, "killed": r.Kill} {
		before := ticks()
		r.must(stop())
		time.Sleep(100 * time.Millisecond) // of work without a daemon, not a wait for a state
		r.must(r.Restart(r.ctx))
		s, err := r.Client.Sandbox(r.ctx, "web")
		r.must(err)
		if s.Status != "DEPLOYED" || !s.Metadata.CreatedAt.Equal(made.Metadata.CreatedAt) || fmt.Sprint(r.boxes()) != ids {
			t.Errorf("%s: %+v", name, s)
		}
		if after := ticks(); after <= before {
			t.Errorf("%s: %d ticks, %d before", name, after, before)
		}
		if got := r.sh("web", "cat /scratch/f"); got != "kept\n" {
			t.Errorf("%s: %q", name, got)
		}
		if to := r.attachedTo("data"); to != "sandbox:web" {
			t.Errorf("%s: attached to %q", name, to)
		}
	}
	_, err := r.Client.DeleteSandbox(r.ctx, "web")
	r.must(err)
	r.must(r.Client.AwaitSandboxGone(r.ctx, "web"))
	if to := r.attachedTo("data"); to != "" || len(r.ephemerals()) > 0 || len(r.boxes()) > 0 {
		t.Errorf("attached to %q, ephemeral %v, boxes %v", to, r.ephemerals(), r.boxes())
	}
	r.box("next", at("/d", "data"))
	if got := r.sh("next", "tail -n 1 /d/ticks"); got != "x\n" {
		t.Errorf("%q", got)
	}
}

// TestKilledAtAnyTime kills the daemon while it makes and deletes sandboxes. What
// is there afterwards is whole, or has failed and holds nothing.
func TestKilledAtAnyTime(t *testing.T) {
	r := start(t)
	r.volume("data", 8)
	for i, delay := range []time.Duration{0, 15, 40, 80, 120, 180, 260, 400} {
		name := fmt.Sprintf("box-%d", i)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			if _, err := r.Client.CreateSandbox(r.ctx, newBox(name, at("/data", "data"), scratch("/scratch"))); err == nil {
				_, _ = r.Client.DeleteSandbox(r.ctx, name) // cut short as well
			}
		}()
		time.Sleep(delay * time.Millisecond) // somewhere in the middle, not a wait for a state
		r.must(r.Kill())
		<-ended
		r.must(r.Restart(r.ctx))
		s, err := r.Client.Sandbox(r.ctx, name)
		switch {
		case client.IsNotFound(err):
		case err != nil:
			t.Fatal(err)
		case s.Status == "DEPLOYED":
			r.sh(name, "touch /data/alive /scratch/alive")
		case s.Status == "DELETING":
		case s.Status == "FAILED":
			if to := r.attachedTo("data"); to != "" || len(r.ephemerals()) > 0 {
				t.Errorf("%v: failed, and the volume is attached to %q, ephemeral ones %v", delay, to, r.ephemerals())
			}
		default:
			t.Errorf("%v: %s", delay, s.Status)
		}
		if err == nil {
			_, err := r.Client.DeleteSandbox(r.ctx, name)
			if err != nil && !client.IsNotFound(err) {
				t.Fatal(err)
			}
			r.must(r.Client.AwaitSandboxGone(r.ctx, name))
		}
		if to := r.attachedTo("data"); to != "" || len(r.ephemerals()) > 0 || len(r.boxes()) > 0 {
			t.Errorf("%v: attached to %q, ephemeral %v, boxes %v", delay, to, r.ephemerals(), r.boxes())
		}
	}
}

// TestFirstProcessDies: as after a host's boot, or out of memory.
func TestFirstProcessDies(t *testing.T) {
	r := start(t)
	r.volume("data", 8)
	for _, down := range []bool{false, true} { // noticed while it runs, or at the next start
		r.box("web", at("/data", "data"), scratch("/scratch"))
		r.sh("web", "echo x > /data/f")
		pid, err := strconv.Atoi(r.first(r.boxes()[0]))
		r.must(err)
		if down {
			r.must(r.Stop())
		}
		r.must(syscall.Kill(pid, syscall.SIGKILL))
		if down {
			r.must(r.Restart(r.ctx))
		}
		r.await("the sandbox to have failed", func() bool {
			s, err := r.Client.Sandbox(r.ctx, "web")
			r.must(err)
			return s.Status == "FAILED"
		})
		if to := r.attachedTo("data"); to != "" || len(r.ephemerals()) > 0 || len(r.boxes()) > 0 {
			t.Errorf("attached to %q, ephemeral %v, boxes %v", to, r.ephemerals(), r.boxes())
		}
		if _, err := r.Client.Exec(r.ctx, "web", client.Exec{Command: "true", Wait: true}); client.Status(err) != 409 {
			t.Errorf("a command for a dead sandbox: %v", err)
		}
		s, err := r.Client.Sandbox(r.ctx, "web")
		r.must(err)
		if last := s.Events[len(s.Events)-1]; last.Type != "failure" || !strings.Contains(last.Message, "ended") {
			t.Errorf("%+v", last)
		}
	}
	r.box("web", at("/data", "data")) // in the place of the failed one
	if got := r.sh("web", "cat /data/f"); got != "x\n" {
		t.Errorf("%q", got)
	}
}

// TestForce: a volume that is taken away by force cannot be written any more, and
// is there for the next sandbox.
func TestForce(t *testing.T) {
	r := start(t)
	r.volume("data", 8)
	r.box("old", at("/data", "data"))
	r.sh("old", "echo before > /data/f; (while :; do echo x >> /data/more; sleep 0.02; done) >/dev/null 2>&1 &")
	all, err := r.Client.Attachments(r.ctx, "data")
	r.must(err)
	if _, err := r.Client.Detach(r.ctx, "data", all[0].ID); client.Status(err) != 409 || !strings.Contains(err.Error(), "delete the sandbox") {
		t.Errorf("by hand: %v", err)
	}
	_, err = r.Client.ForceDetach(r.ctx, "data", all[0].ID)
	r.must(err)
	r.box("new", at("/data", "data"))
	size := r.sh("new", "cat /data/f; wc -c < /data/more")
	if !strings.HasPrefix(size, "before\n") {
		t.Errorf("%q", size)
	}
	_, _ = r.Client.Exec(r.ctx, "old", client.Exec{Command: "echo late >> /data/more; sync", Wait: true, Timeout: 10})
	if again := r.sh("new", "cat /data/f; wc -c < /data/more"); again != size {
		t.Errorf("the old holder goes on writing: %q, %q before", again, size)
	}
}

// TestRecordsAreLost: a container that no record names is removed at the next
// start, and its volumes are free. What was an ephemeral volume stays, marked:
// nothing is deleted of which it is not known that it may be.
func TestRecordsAreLost(t *testing.T) {
	r := start(t)
	r.volume("data", 8)
	r.box("web", at("/data", "data"), scratch("/scratch"))
	r.sh("web", "echo x > /data/f")
	r.must(r.Stop())
	if out, err := exec.Command(r.bin, "rebuild", "--state-dir", r.State, "--pool-mode", "image", "--pool-size", "1GiB", "--yes").CombinedOutput(); err != nil {
		t.Fatalf("rebuild: %v\n%s", err, out)
	}
	r.must(r.Restart(r.ctx))
	if _, err := r.Client.Sandbox(r.ctx, "web"); !client.IsNotFound(err) {
		t.Errorf("the sandbox: %v", err)
	}
	r.await("the volume to be free", func() bool { return r.attachedTo("data") == "" })
	if len(r.boxes()) > 0 || len(r.ephemerals()) != 1 {
		t.Errorf("boxes %v, ephemeral volumes %v", r.boxes(), r.ephemerals())
	}
	r.box("next", at("/data", "data"))
	if got := r.sh("next", "cat /data/f"); got != "x\n" {
		t.Errorf("%q", got)
	}
}

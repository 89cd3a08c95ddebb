package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
	"holdfast/internal/guest"
	"holdfast/internal/localdaemon"
	"holdfast/internal/tarball"
)

// Options say where the demo finds what it needs.
type Options struct {
	Daemon string    // path of holdfastd
	Source string    // a real directory tree to make the template of; empty: Go's own sources, else /usr/share
	Out    io.Writer // the narration
}

// show is one demonstration.
type show struct {
	Options
	dir        string
	daemon     *localdaemon.Daemon
	containers []string
	guests     []*guest.VM
	serial     string // of the volume in a machine
	node       string // its device there
	step       int
}

// act is one step of a demonstration.
type act = func(context.Context) error

// Run shows the whole job with containers and cleans up, also when a step fails.
func Run(ctx context.Context, o Options) error {
	return play(ctx, o, func(s *show) []act {
		return []act{s.start, s.template, s.volumes, s.firstContainer, s.secondContainer, s.growXFS, s.growExt4, s.served, s.delete}
	})
}

func play(ctx context.Context, o Options, acts func(*show) []act) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the demo mounts filesystems and runs sandboxes: run it as root")
	}
	s := &show{Options: o}
	if s.dir, err = os.MkdirTemp("", "holdfast-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.cleanUp(context.WithoutCancel(ctx))) }()
	start := time.Now()
	for _, act := range acts(s) {
		if err := act(ctx); err != nil {
			return err
		}
	}
	fmt.Fprintf(o.Out, "\nDone in %.1f s. Cleaning up.\n", time.Since(start).Seconds())
	return nil
}

// title begins a step of the narration.
func (s *show) title(format string, args ...any) {
	s.step++
	fmt.Fprintf(s.Out, "\n%d. %s\n", s.step, fmt.Sprintf(format, args...))
}

// timed performs one action and says how long it took.
func (s *show) timed(what string, act func() error) error {
	start := time.Now()
	if err := act(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	fmt.Fprintf(s.Out, "   %8.1f ms  %s\n", float64(time.Since(start).Microseconds())/1000, what)
	return nil
}

func (s *show) say(format string, args ...any) {
	fmt.Fprintf(s.Out, "               %s\n", fmt.Sprintf(format, args...))
}

func (s *show) start(ctx context.Context) error {
	plain := filepath.Join(s.dir, plainPool)
	if err := os.Mkdir(plain, 0o700); err != nil {
		return err
	}
	return s.startDaemon(ctx, "--runc-root", s.runcRoot(), "--pool", plainPool+"=sparse:"+plain)
}

func (s *show) startDaemon(ctx context.Context, args ...string) error {
	s.title("A daemon with nothing configured: state in one directory, an XFS pool made there if it cannot reflink")
	return s.timed("holdfastd is ready", func() (err error) {
		s.daemon, err = localdaemon.Start(ctx, s.Daemon, filepath.Join(s.dir, "state"), append(args, "--pool-size", "6GiB")...)
		if err == nil {
			s.say("%s", s.daemon.URL)
		}
		return err
	})
}

func (s *show) template(ctx context.Context) error {
	s.title("Template demo:1 from a real tree")
	tree := filepath.Join(s.dir, "tree")
	source, err := makeTree(ctx, tree, s.Source)
	if err != nil {
		return err
	}
	plan, err := tarball.New(ctx, tree)
	if err != nil {
		return err
	}
	s.say("%s: %d entries, %s, with symbolic links, hard links and names like %q", source, plan.Files, bytesize.Human(plan.Bytes), oddName)
	archive := plan.Reader()
	defer archive.Close()
	return s.timed("template push demo (upload, check, build, READY)", func() error {
		t, err := s.daemon.Client.PushTemplate(ctx, client.Push{Name: "demo", Archive: archive, Length: plan.Length(), DefaultSize: 512})
		if err == nil && t.State.LatestVersion != "1" {
			err = fmt.Errorf("latest version is %q", t.State.LatestVersion)
		}
		return err
	})
}

func (s *show) volumes(ctx context.Context) error {
	s.title("Volumes from it: the first of a size and filesystem pays for it, the next are clones")
	for _, v := range []struct{ name, fs string }{{"first", "ext4"}, {"work", "ext4"}, {"third", "ext4"}, {"data", "xfs"}, {"data2", "xfs"}} {
		err := s.timed(fmt.Sprintf("volume create %s --template demo:1 --filesystem %s --size 512", v.name, v.fs), func() error {
			made, err := s.daemon.Client.CreateVolume(ctx, client.Volume{
				Metadata: client.VolumeMetadata{Name: v.name}, Spec: client.VolumeSpec{Size: 512, Template: "demo:1", Filesystem: v.fs}}, "")
			if err == nil && made.Status != "DEPLOYED" {
				err = fmt.Errorf("it is %s", made.Status)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *show) firstContainer(ctx context.Context) error {
	s.title("A running container gets the volume, and writes to it")
	if err := s.container(ctx, "box-1"); err != nil {
		return err
	}
	if err := s.attach(ctx, "work", "box-1", "/data"); err != nil {
		return err
	}
	out, err := s.exec(ctx, "box-1", "find /data | wc -l; cd '/data/odd names'; echo *; echo 'written in box-1' > /data/note; sync")
	if err != nil {
		return err
	}
	s.say("in the container: %s", oneLine(out))
	return s.timed("container destroyed (kill -9, runc delete)", func() error { return s.destroy(ctx, "box-1") })
}

func (s *show) secondContainer(ctx context.Context) error {
	s.title("The volume outlives it: the same data in a second container")
	if err := s.container(ctx, "box-2"); err != nil {
		return err
	}
	err := s.timed("the dead container's attachment is released", func() error { return s.released(ctx, "work") })
	if err != nil {
		return err
	}
	if err := s.attach(ctx, "work", "box-2", "/elsewhere"); err != nil {
		return err
	}
	out, err := s.exec(ctx, "box-2", "cat /elsewhere/note")
	if err != nil {
		return err
	}
	if strings.TrimSpace(out) != "written in box-1" {
		return fmt.Errorf("the second container reads %q", out)
	}
	s.say("in the container: cat /elsewhere/note: %s", oneLine(out))
	return nil
}

func (s *show) growXFS(ctx context.Context) error {
	s.title("Growth while mounted (XFS)")
	if err := s.attach(ctx, "data", "box-2", "/xfs"); err != nil {
		return err
	}
	before, err := s.exec(ctx, "box-2", "df -m /xfs | tail -1")
	if err != nil {
		return err
	}
	size := int64(2048)
	err = s.timed("volume update data --size 2048", func() error {
		v, err := s.daemon.Client.UpdateVolume(ctx, "data", client.VolumeChange{SizeMiB: &size})
		if err == nil && v.State.Sizes != nil && v.State.Sizes.Pending != "" {
			err = errors.New(v.State.Sizes.Pending)
		}
		return err
	})
	if err != nil {
		return err
	}
	after, err := s.exec(ctx, "box-2", "df -m /xfs | tail -1")
	if err != nil {
		return err
	}
	s.say("df before: %s", oneLine(before))
	s.say("df after:  %s", oneLine(after))
	return s.detach(ctx, "data")
}

// growExt4 shows both ways: at once where the kernel permits it, pending until
// the volume is detached where it does not.
func (s *show) growExt4(ctx context.Context) error {
	s.title("Growth of the attached ext4 volume")
	size := int64(1024)
	pending := ""
	err := s.timed("volume update work --size 1024", func() error {
		v, err := s.daemon.Client.UpdateVolume(ctx, "work", client.VolumeChange{SizeMiB: &size})
		if err == nil && v.State.Sizes != nil {
			pending = v.State.Sizes.Pending
		}
		return err
	})
	if err != nil {
		return err
	}
	if pending != "" {
		s.say("pending: %s", pending)
	}
	if err := s.detach(ctx, "work"); err != nil {
		return err
	}
	if err := s.attach(ctx, "work", "box-2", "/elsewhere"); err != nil {
		return err
	}
	out, err := s.exec(ctx, "box-2", "df -m /elsewhere | tail -1; cat /elsewhere/note")
	if err != nil {
		return err
	}
	s.say("df and note: %s", oneLine(out))
	return s.detach(ctx, "work")
}

func (s *show) delete(ctx context.Context) error {
	s.title("Deletion: the name is free at once, the space is reclaimed in the background")
	for _, name := range []string{"first", "work", "third", "data", "data2"} {
		err := s.timed("volume delete "+name, func() error {
			_, err := s.daemon.Client.DeleteVolume(ctx, name)
			return err
		})
		if err != nil {
			return err
		}
	}
	_, err := s.daemon.Client.Volume(ctx, "work")
	if err == nil {
		return errors.New("a deleted volume is still there")
	}
	if !client.IsNotFound(err) {
		return fmt.Errorf("a deleted volume: %w", err)
	}
	return nil
}

// attach puts a volume into a container.
func (s *show) attach(ctx context.Context, volume, box, path string) error {
	return s.timed(fmt.Sprintf("attachment create %s --container %s --mount-path %s", volume, box, path), func() error {
		_, err := s.daemon.Client.Attach(ctx, volume, client.Attachment{
			Holder: "sandbox:" + box, MountPath: path, Target: client.Target{Type: "runc", Container: s.id(box), Root: s.runcRoot()}})
		return err
	})
}

func (s *show) detach(ctx context.Context, volume string) error {
	return s.timed("attachment delete (flushed and released on return)", func() error {
		attachments, err := s.daemon.Client.Attachments(ctx, volume)
		if err != nil {
			return err
		}
		for _, a := range attachments {
			if _, err := s.daemon.Client.Detach(ctx, volume, a.ID); err != nil {
				return err
			}
		}
		return nil
	})
}

// released waits until the daemon has noticed that a container is dead.
func (s *show) released(ctx context.Context, volume string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		attachments, err := s.daemon.Client.Attachments(ctx, volume)
		if err != nil || len(attachments) == 0 {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *show) cleanUp(ctx context.Context) error {
	var failures error
	for _, box := range s.containers {
		failures = errors.Join(failures, s.destroy(ctx, box))
	}
	for _, g := range s.guests {
		failures = errors.Join(failures, g.Close())
	}
	if s.daemon != nil {
		for v, err := range s.daemon.Client.Volumes(ctx, client.VolumeQuery{}) {
			if err != nil {
				break // the daemon never came up: there is nothing to detach
			}
			failures = errors.Join(failures, s.released(ctx, v.Metadata.Name))
		}
		failures = errors.Join(failures, s.daemon.Remove(ctx))
	}
	if failures != nil {
		return fmt.Errorf("clean-up, see %s: %w", s.dir, failures)
	}
	return os.RemoveAll(s.dir)
}

func oneLine(s string) string {
	return strings.Join(strings.Fields(strings.ReplaceAll(s, "\n", " ")), " ")
}

package demo

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
	"holdfast/internal/run"
)

// plainPool is a second pool, in an ordinary directory.
const plainPool = "plain"

// hasWorker reports whether the worker's program is installed.
func (s *show) hasWorker() bool {
	_, err := os.Stat(filepath.Join(filepath.Dir(s.Daemon), "holdfast-blockd"))
	return err == nil
}

// served shows a pool that cannot share bytes, where there is one, and what goes over a
// socket.
func (s *show) served(ctx context.Context) error {
	if !s.hasWorker() {
		return nil
	}
	s.title("A second pool, in a plain directory: where it cannot share bytes, volumes are layers, and a worker serves them by a socket")
	for _, name := range []string{"served-0", "served"} { // the first of a size pays for a copy
		err := s.timed("volume create "+name+" --template demo:1 --pool "+plainPool, func() error {
			_, err := s.daemon.Client.CreateVolume(ctx, client.Volume{
				Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Size: 512, Template: "demo:1", Pool: plainPool}}, "")
			return err
		})
		if err != nil {
			return err
		}
	}
	var a client.Attachment
	err := s.timed("attachment create served --export nbd", func() (err error) {
		a, err = s.daemon.Client.Attach(ctx, "served", client.Attachment{Holder: "agent:backup", Target: client.Target{Type: "export", Protocol: "nbd"}})
		return err
	})
	if err != nil {
		return err
	}
	if err := s.sayServed(ctx, a); err != nil {
		return err
	}
	err = s.timed("snapshot create served before", func() error {
		_, err := s.daemon.Client.CreateSnapshot(ctx, "served", client.NewSnapshot{Name: "before"}, "")
		return err
	})
	if err != nil {
		return err
	}
	if err := s.outlives(ctx, a); err != nil {
		return err
	}
	if err := s.detach(ctx, "served"); err != nil {
		return err
	}
	return s.timed("volume and snapshot deleted", func() error {
		_, snapshot := s.daemon.Client.DeleteSnapshot(ctx, "served", "before")
		_, first := s.daemon.Client.DeleteVolume(ctx, "served-0")
		_, second := s.daemon.Client.DeleteVolume(ctx, "served")
		return errors.Join(snapshot, first, second)
	})
}

// sayServed tells what a client of the export finds.
func (s *show) sayServed(ctx context.Context, a client.Attachment) error {
	v, err := s.daemon.Client.Volume(ctx, "served")
	if err != nil {
		return err
	}
	if a.Launch != nil {
		s.say("%s", a.Launch.URI)
	}
	if h := v.State.Sizes.Hydration; h != nil {
		s.say("of its %s, %s are the template's still: it is used meanwhile", bytesize.Human(h.Total), bytesize.Human(h.Absent))
	}
	if _, err := run.Look("nbdinfo"); err != nil || a.Launch == nil {
		return nil //nolint:nilerr // a client that is not needed otherwise
	}
	result, err := run.Run(ctx, run.Cmd{Args: []string{"nbdinfo", "--size", a.Launch.URI}})
	s.say("nbdinfo --size: %s", oneLine(string(result.Stdout)))
	return err
}

// outlives kills the daemon, and shows that the worker has not noticed.
func (s *show) outlives(ctx context.Context, a client.Attachment) error {
	before, err := s.daemon.Client.IO(ctx, "served")
	if err != nil {
		return err
	}
	err = s.timed("holdfastd killed (kill -9) and started again", func() error {
		if err := s.daemon.Kill(); err != nil {
			return err
		}
		return s.daemon.Restart(ctx)
	})
	if err != nil {
		return err
	}
	after, err := s.daemon.Client.IO(ctx, "served")
	if err != nil {
		return err
	}
	at, err := s.daemon.Client.Attachment(ctx, "served", a.ID)
	if err != nil {
		return err
	}
	if before.Worker == nil || after.Worker == nil || !after.Worker.Since.Equal(before.Worker.Since) || at.Socket != a.Socket {
		return errors.New("the daemon's end has cost the volume its worker")
	}
	s.say("the same worker serves the same socket, since %s", after.Worker.Since.Format("15:04:05.000"))
	return nil
}

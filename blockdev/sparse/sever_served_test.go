package sparse

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/vhost/frontend"
	"holdfast/internal/sys"
)

// TestSeverWhileAnotherOpens: somebody waits with the image's turn for a worker that does
// not answer. When that is killed he starts the next one, which is ended as well: nobody
// has the image then that could not be found again.
func TestSeverWhileAnotherOpens(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	p, err := Open(t.Context(), filepath.Join(blockdevtest.Ext4Dir(t), "pool"), Options{Host: "test", Rate: -1, Workers: workersFor(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Shutdown)
	ctx := t.Context()
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(p.Create(ctx, id, 1<<20), p.Publish(ctx, id, []byte("{}"))); err != nil {
		t.Fatal(err)
	}
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}
	if _, err = p.Open(ctx, id, want); err != nil {
		t.Fatal(err)
	}
	s, err := p.Observe(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	blockdevtest.StandStill(t, s.Pid)
	opened := make(chan error, 1)
	go func() { _, err := p.Open(ctx, id, want); opened <- err }()
	await(t, "the other has the turn", func() bool {
		soon, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		done, err := p.turns.take(soon, id)
		if err == nil {
			done()
		}
		return err != nil
	})
	bounded, cancel := context.WithTimeout(ctx, 15*time.Second) // a third of it goes by gently
	defer cancel()
	if err := p.Sever(bounded, id); err != nil {
		t.Error(err)
	}
	if err := <-opened; err != nil {
		t.Errorf("the other: %v", err)
	}
	e, err := p.Open(ctx, id, want)
	if err == nil {
		err = p.Close(ctx, id, e.Lease)
	}
	if err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// cutWorkers is a pool's way to its workers, cut where its process dies: before each that
// they are told to do.
type cutWorkers struct {
	Workers
	at func(point string) error
}

func (c cutWorkers) cut(point string, do func() error) error {
	if err := c.at(point); err != nil {
		return err
	}
	return do()
}

func (c cutWorkers) Refuse(ctx context.Context, r control.Refusal) error {
	return c.cut("refuse", func() error { return c.Workers.Refuse(ctx, r) })
}

func (c cutWorkers) Lead(r control.Refusal) error {
	return c.cut("lead", func() error { return c.Workers.Lead(r) })
}

func (c cutWorkers) AwaitRefused(ctx context.Context, r control.Refusal) error {
	return c.cut("await", func() error { return c.Workers.AwaitRefused(ctx, r) })
}

func (c cutWorkers) Kill(ctx context.Context, id blockdev.ID) error {
	return c.cut("kill", func() error { return c.Workers.Kill(ctx, id) })
}

// severed is a volume that is taken from a disk's client while the process that does it dies
// somewhere.
type severed struct {
	*testing.T
	workers *control.Starter
	dir     string
	pool    *Pool
	id      blockdev.ID
	client  *frontend.Frontend

	cut    int // the point at which it dies, 0 for nowhere
	passed int
	cutAt  string
}

const (
	severedBlock = 4096
	severedOwner = 4321 // a user, who has the client
)

func (s *severed) ok(err error) {
	s.Helper()
	if err != nil {
		s.Fatalf("cut at %q: %v", s.cutAt, err)
	}
}

// at is a point. Who is dead does nothing any more.
func (s *severed) at(point string) error {
	if s.cut > 0 && s.cutAt == "" {
		if s.passed++; s.passed == s.cut {
			s.cutAt = point
		}
	}
	if s.cutAt != "" {
		return errCut
	}
	return nil
}

func (s *severed) open(w Workers) {
	var err error
	s.pool, err = Open(s.Context(), s.dir, Options{Host: "test", Rate: -1, Workers: w})
	s.ok(err)
}

// request makes one of the disk's client and gives its status.
func (s *severed) request(kind uint32) byte {
	q := s.client.Queues[0]
	q.Put(0, kind, 0, severedBlock)
	s.ok(errors.Join(q.Show(), q.Wait()))
	_, status, answered := q.Take()
	if !answered {
		s.Fatal("no answer")
	}
	return status
}

// comesAgain has the client connect where it was once its worker has ended, as QEMU does.
func (s *severed) comesAgain(ctx context.Context, worker int, at string) <-chan error {
	pidfd, err := sys.OpenPidfd(worker)
	s.ok(err)
	come := make(chan error, 1)
	go func() {
		defer pidfd.Close()
		err := sys.AwaitEnd(ctx, pidfd)
		for ; err == nil; time.Sleep(time.Millisecond) {
			if err = s.client.Connect(at); err == nil {
				break
			}
			if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
				err = ctx.Err()
			}
		}
		come <- err
	}()
	return come
}

// TestSeverCut: whatever Sever has done when its process dies, and it is called again by
// the next one, the disk's client meets who refuses where it was, as the user that it is, and
// the volume is closed, with what was acknowledged. Also where the worker had died before.
func TestSeverCut(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	base, workers := blockdevtest.Ext4Dir(t), workersFor(t)
	for name, dies := range map[string]bool{"lives": false, "has died": true} {
		t.Run(name, func(t *testing.T) {
			var points []string
			for cut := 1; ; cut++ {
				s := &severed{T: t, workers: workers, dir: filepath.Join(base, name, strconv.Itoa(cut)), id: blockdevtest.NewID(blockdev.PrefixVolume)}
				s.severCut(cut, dies)
				if s.cutAt == "" {
					break
				}
				points = append(points, s.cutAt)
			}
			want := []string{"sever.worker", "refuse", "sever.stop", "lead", "sever.close", "close.settle", "await"}
			if dies {
				want[2] = "kill"
			}
			if !slices.Equal(points, want) {
				t.Errorf("cut at %v, want %v", points, want)
			}
		})
	}
}

func (s *severed) severCut(cut int, dies bool) {
	ctx, cancel := context.WithTimeout(s.Context(), time.Minute)
	defer cancel()
	s.open(cutWorkers{s.workers, s.at})
	defer func() { s.pool.Shutdown() }()
	s.ok(errors.Join(s.pool.Create(ctx, s.id, 1<<20), s.pool.Publish(ctx, s.id, []byte("{}"))))
	e, err := s.pool.Open(ctx, s.id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.VhostUser}})
	s.ok(err)
	s.ok(os.Lchown(e.Path, severedOwner, -1))
	s.client, err = frontend.New(frontend.Options{Inflight: true})
	s.ok(err)
	defer s.client.Close()
	defer context.AfterFunc(ctx, s.client.Queues[0].Abandon)()
	s.ok(s.client.Connect(e.Path))
	content := bytes.Repeat([]byte{7}, severedBlock)
	copy(s.client.Queues[0].Data(0), content)
	if status := s.request(frontend.Write); status != 0 {
		s.Fatalf("a write has status %d", status)
	}
	w, err := s.workers.Find(ctx, s.id)
	s.ok(err)
	come := s.comesAgain(ctx, w.Pid(), e.Path)
	if dies {
		s.ok(s.workers.KillBeside(ctx, s.id))
	}
	s.cut, s.pool.crash = cut, s.at
	err = s.pool.Sever(ctx, s.id)
	s.cut = 0
	if s.cutAt != "" {
		s.pool.Shutdown()
		s.open(s.workers)
		err = s.pool.Sever(ctx, s.id)
	}
	s.ok(err)
	s.ok(<-come)
	if status := s.request(frontend.Read); status != 1 {
		s.Errorf("cut at %q: a read has status %d", s.cutAt, status)
	}
	var socket syscall.Stat_t
	if s.ok(syscall.Stat(e.Path, &socket)); socket.Uid != severedOwner {
		s.Errorf("cut at %q: the socket of who refuses is user %d's", s.cutAt, socket.Uid)
	}
	s.client.Hangup()
	s.ok(s.workers.EndRefusals(ctx))
	e, err = s.pool.Open(ctx, s.id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.File}})
	s.ok(err)
	got := make([]byte, severedBlock)
	f, err := os.Open(e.Path)
	s.ok(err)
	_, err = f.ReadAt(got, 0)
	s.ok(errors.Join(err, f.Close(), s.pool.Close(ctx, s.id, e.Lease)))
	if !bytes.Equal(got, content) {
		s.Errorf("cut at %q: what was acknowledged reads as %x", s.cutAt, got[:4])
	}
}

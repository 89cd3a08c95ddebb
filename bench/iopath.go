package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/internal/run"
)

// ioPath is a way to the bytes of an image, open.
type ioPath struct {
	ioWay
	node    string // of a guest's disk, in the guest
	server  int    // process id of who serves; 0: nobody does
	by      fioBy  // how fio is started
	run     func(ctx context.Context, j ioJob, each time.Duration) (ioSample, float64, error)
	prepare func(context.Context) error // before each job
	settle  func() error                // after each job: has done later what a path would leave to the next one
	close   func() error
}

// fioBy is what fio needs beside its job.
type fioBy struct {
	before []string // a program that starts it, with arguments
	env    []string
}

// ioWay is a way to the bytes as the bench knows it.
type ioWay struct {
	key, name string
	takes     func(ioJob) bool
	open      func(ctx context.Context, b *IO, p *ioPath) error
}

// ioWays are all, the yardstick first.
func ioWays() []ioWay {
	servers := []ioWay{
		{"raw", "raw file", again, openRaw},
		{"raw-thread", "raw file by another thread", again, openThread},
		{"vhost", "vhost-user-blk", again, ownVhost},
		{"qsd-vhost", "qemu-storage-daemon's vhost-user-blk", again, qsdVhost},
		{"nbd", "NBD", again, ownNBD},
		{"qemu-nbd", "qemu-nbd", again, qemuNBD},
		{"qsd-nbd", "qemu-storage-daemon's NBD", small, qsdNBD},
		{"nbdkit", "nbdkit's file plugin", smallReads, nbdkit},
	}
	return slices.Concat(servers, mountWays(), cowWays(), tlsWays())
}

// small are jobs of 4 KiB, alone and many at a time: what a way costs each request.
func small(j ioJob) bool { return j.block == 4<<10 && j.depth != 8 && !j.flush && !j.once }

// again are jobs for bytes that are there; on a path for volumes that are empty the
// first write to each block is another load.
func again(j ioJob) bool { return !strings.HasPrefix(j.name, "first-write") }

// smallReads leave nothing in the page cache that is to be written later.
func smallReads(j ioJob) bool { return small(j) && !j.writes() }

func openRaw(_ context.Context, b *IO, p *ioPath) error {
	p.fio(b, "ioengine=io_uring", "direct=1", "filename="+b.image)
	return nil
}

// fio has a path's jobs done by fio, told so in its global section.
func (p *ioPath) fio(b *IO, global ...string) { p.fioOn(b, b.size, global...) }

// fioOn is fio for a path of another size.
func (p *ioPath) fioOn(b *IO, size int64, global ...string) {
	p.run = func(ctx context.Context, j ioJob, each time.Duration) (ioSample, float64, error) {
		file, out := filepath.Join(b.Dir, "job.fio"), filepath.Join(b.Dir, "job.json")
		if err := os.WriteFile(file, []byte(jobFile(j.text, each, size, global...)), 0o600); err != nil {
			return ioSample{}, 0, err
		}
		// fio's NBD engine talks on the standard output.
		if _, err := run.Run(ctx, run.Cmd{Args: slices.Concat(p.by.before, []string{"fio", "--output-format=json", "--output=" + out, file}), Env: p.by.env, Dir: b.Dir, Timeout: each + time.Minute}); err != nil {
			return ioSample{}, 0, err
		}
		return readFio(out, j.flush)
	}
}

// jobFile is what fio is given for jobs on paths of size bytes.
func jobFile(jobs string, each time.Duration, size int64, global ...string) string {
	lines := append([]string{"[global]", "time_based=1", fmt.Sprintf("runtime=%dms", each.Milliseconds()), fmt.Sprintf("size=%d", size), "randrepeat=0"}, global...)
	return strings.Join(lines, "\n") + "\n" + jobs
}

func (p *ioPath) nbd(b *IO, s *ioServer) {
	p.server, p.close = s.pid, s.stop
	p.fio(b, "ioengine=nbd", "uri=nbd+unix:///?socket="+s.socket)
}

func (p *ioPath) vhost(s *ioServer) {
	p.server, p.close = s.pid, s.stop
	p.run = func(ctx context.Context, j ioJob, each time.Duration) (ioSample, float64, error) {
		return loadVhost(ctx, s.socket, j, each)
	}
}

func (b *IO) socket(p *ioPath) string { return filepath.Join(b.Dir, p.key+".sock") }

func ownVhost(_ context.Context, b *IO, p *ioPath) error {
	s, err := startOwn(b.Program, ServeOptions{Image: b.image, Kind: blockdev.VhostUser})
	if err == nil {
		p.vhost(s)
	}
	return err
}

func ownNBD(_ context.Context, b *IO, p *ioPath) error {
	s, err := startOwn(b.Program, ServeOptions{Image: b.image, Kind: blockdev.NBD})
	if err == nil {
		p.nbd(b, s)
	}
	return err
}

// qsd is qemu-storage-daemon with a raw image, before what exports it.
func qsd(image string) []string {
	return []string{"qemu-storage-daemon", "--blockdev", "driver=file,node-name=image,cache.direct=on,aio=io_uring,discard=unmap,locking=off,filename=" + image}
}

func qsdVhost(ctx context.Context, b *IO, p *ioPath) error {
	s, err := startQSD(ctx, b.image, b.socket(p))
	if err == nil {
		p.vhost(s)
	}
	return err
}

// startQSD starts a qemu-storage-daemon that serves an image by vhost-user-blk.
func startQSD(ctx context.Context, image, socket string) (*ioServer, error) {
	return startPeer(ctx, socket, append(qsd(image),
		"--export", "type=vhost-user-blk,id=export,node-name=image,writable=on,addr.type=unix,addr.path="+socket))
}

func qsdNBD(ctx context.Context, b *IO, p *ioPath) error {
	socket := b.socket(p)
	s, err := startPeer(ctx, socket, append(qsd(b.image),
		"--nbd-server", "max-connections=8,addr.type=unix,addr.path="+socket, "--export", "type=nbd,id=export,node-name=image,name=,writable=on"))
	if err == nil {
		p.nbd(b, s)
	}
	return err
}

func qemuNBD(ctx context.Context, b *IO, p *ioPath) error {
	socket := b.socket(p)
	s, err := startPeer(ctx, socket, []string{"qemu-nbd", "--format=raw", "--cache=none", "--aio=io_uring", "--discard=unmap", "--persistent", "--shared=8", "--socket=" + socket, b.image})
	if err == nil {
		p.nbd(b, s)
	}
	return err
}

// nbdkit has an image of its own: it goes through the page cache, which direct I/O
// of others on the same file would have to empty.
func nbdkit(ctx context.Context, b *IO, p *ioPath) error {
	image, socket := filepath.Join(b.Dir, "cached"), b.socket(p)
	if err := fillImage(image, b.size); err != nil {
		return err
	}
	s, err := startPeer(ctx, socket, []string{"nbdkit", "--foreground", "--unix", socket, "file", image})
	if err == nil {
		p.nbd(b, s)
	}
	return err
}

// measureOnce has one job done on a path, with what it costs.
func (p *ioPath) measureOnce(ctx context.Context, j ioJob, each time.Duration) (ioSample, error) {
	if p.prepare != nil {
		if err := p.prepare(ctx); err != nil {
			return ioSample{}, err
		}
	}
	machine, server, err := p.costs()
	if err != nil {
		return ioSample{}, err
	}
	s, requests, err := p.run(ctx, j, each)
	if err != nil {
		return s, err
	}
	machineAfter, serverAfter, err := p.costs()
	s.machine, s.server = (machineAfter-machine)/requests, (serverAfter-server)/requests
	if p.settle != nil {
		err = errors.Join(err, p.settle())
	}
	return s, err
}

func (p *ioPath) costs() (machine, server float64, err error) {
	if machine, err = machineCPU(); err != nil {
		return 0, 0, err
	}
	server, err = p.serverCost()
	return machine, server, err
}

func (p *ioPath) serverCost() (float64, error) {
	if p.server == 0 {
		return 0, nil
	}
	return cpuOf(p.server)
}

// chosen tells whether a comma-separated list names something; an empty list names all.
func chosen(list, key string) bool {
	return list == "" || slices.Contains(strings.Split(list, ","), key)
}

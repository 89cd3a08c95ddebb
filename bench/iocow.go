package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/run"
)

// cowWay is a way to a volume that shares a base with others: our overlay, or
// qcow2 as QEMU's programs serve it.
type cowWay struct {
	kind  blockdev.Kind
	what  string // "layers", "qcow2", or "sparse": a plain file with nothing in it
	state string // "fresh": made anew before each job; "base": nothing is written; "full": all blocks are its own
}

// cowWays are all of them. What a volume is after hydration, with all of its blocks
// in the top layer, is the "full" one.
func cowWays() []ioWay {
	first := func(j ioJob) bool { return strings.HasPrefix(j.name, "first-write") }
	ways := []struct {
		key, name string
		way       cowWay
		takes     func(ioJob) bool
	}{
		{"vhost-sparse", "vhost-user-blk, a sparse file", cowWay{blockdev.VhostUser, "sparse", "fresh"}, first},
		{"vhost-cow-first", "vhost-user-blk, layers over a base", cowWay{blockdev.VhostUser, "layers", "fresh"}, first},
		{"qcow2-vhost-first", "qemu-storage-daemon's vhost-user-blk, qcow2 over a base", cowWay{blockdev.VhostUser, "qcow2", "fresh"}, first},
		{"nbd-sparse", "NBD, a sparse file", cowWay{blockdev.NBD, "sparse", "fresh"}, first},
		{"nbd-cow-first", "NBD, layers over a base", cowWay{blockdev.NBD, "layers", "fresh"}, first},
		{"qcow2-nbd-first", "qemu-nbd, qcow2 over a base", cowWay{blockdev.NBD, "qcow2", "fresh"}, first},
		{"vhost-cow-base", "vhost-user-blk, layers, blocks of the base", cowWay{blockdev.VhostUser, "layers", "base"}, smallReads},
		{"vhost-cow", "vhost-user-blk, layers, blocks of the top layer", cowWay{blockdev.VhostUser, "layers", "full"}, small},
		{"qcow2-vhost", "qemu-storage-daemon's vhost-user-blk, qcow2, its own blocks", cowWay{blockdev.VhostUser, "qcow2", "full"}, small},
		{"nbd-cow", "NBD, layers, blocks of the top layer", cowWay{blockdev.NBD, "layers", "full"}, small},
		{"qcow2-nbd", "qemu-nbd, qcow2, its own blocks", cowWay{blockdev.NBD, "qcow2", "full"}, small},
	}
	all := make([]ioWay, 0, len(ways))
	for _, w := range ways {
		all = append(all, ioWay{w.key, w.name, w.takes, w.way.open})
	}
	return all
}

func (w cowWay) open(ctx context.Context, b *IO, p *ioPath) error {
	if err := b.makeBase(); err != nil {
		return err
	}
	if w.what == "qcow2" {
		if _, err := run.Look("qemu-img"); err != nil {
			return err
		}
	}
	if w.state != "fresh" {
		return w.start(ctx, b, p)
	}
	p.prepare = func(ctx context.Context) error { return w.start(ctx, b, p) }
	p.settle = func() error { return w.drop(b, p) }
	return nil
}

// makeBase makes the file that nobody writes any more.
func (b *IO) makeBase() error {
	if b.base != "" {
		return nil
	}
	b.base = filepath.Join(b.Dir, "base")
	return fillImage(b.base, b.size)
}

// start makes the volume and has it served.
func (w cowWay) start(ctx context.Context, b *IO, p *ioPath) (err error) {
	name := filepath.Join(b.Dir, p.key)
	var s *ioServer
	switch w.what {
	case "sparse":
		if err = makeSparse(name, b.size); err == nil {
			s, err = startOwn(b.Program, ServeOptions{Image: name, Kind: w.kind})
		}
	case "layers":
		if err = w.makeLayer(b, name); err == nil {
			s, err = startOwn(b.Program, ServeOptions{Layer: name, Image: b.base, Kind: w.kind})
		}
	case "qcow2":
		if err = w.makeQcow2(ctx, b, name); err == nil {
			s, err = w.serveQcow2(ctx, name, b.socket(p))
		}
	}
	if err != nil {
		return err
	}
	if w.kind == blockdev.VhostUser {
		p.vhost(s)
	} else {
		p.nbd(b, s)
	}
	return nil
}

// drop ends a volume that was made for one job.
func (w cowWay) drop(b *IO, p *ioPath) error {
	if p.close == nil {
		return nil
	}
	err := p.close()
	p.close = nil
	name := filepath.Join(b.Dir, p.key)
	for _, path := range []string{name, name + ".data", name + ".map", b.socket(p)} {
		if e := os.Remove(path); !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

func makeSparse(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

func (w cowWay) makeLayer(b *IO, name string) error {
	f, drop, err := openLayer(name)
	if err != nil {
		return err
	}
	defer drop()
	if err := overlay.Create(f, b.size); err != nil || w.state != "full" {
		return err
	}
	v, err := overlay.Open([]overlay.Files{f}, nil)
	if err != nil {
		return err
	}
	from, err := os.Open(b.base)
	if err != nil {
		return err
	}
	defer from.Close()
	p := direct(1 << 20)
	for off := int64(0); off < b.size; off += int64(len(p)) {
		if _, err := io.ReadFull(from, p); err != nil {
			return err
		}
		if _, err := v.WriteAt(p, off); err != nil {
			return err
		}
	}
	return v.Sync()
}

// openLayer opens the files of a layer, and makes them if they are not there.
func openLayer(name string) (overlay.Files, func(), error) {
	data, err := os.OpenFile(name+".data", os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	if err != nil {
		return overlay.Files{}, nil, err
	}
	m, err := os.OpenFile(name+".map", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return overlay.Files{}, nil, errors.Join(err, data.Close())
	}
	// Whoever wrote has synced.
	return overlay.Files{Data: overlay.OSFile{File: data}, Map: overlay.OSFile{File: m}}, func() { _ = errors.Join(data.Close(), m.Close()) }, nil
}

func (w cowWay) makeQcow2(ctx context.Context, b *IO, name string) error {
	_, err := run.Run(ctx, run.Cmd{Args: []string{"qemu-img", "create", "-q", "-f", "qcow2", "-b", b.base, "-F", "raw", name}})
	if err != nil || w.state != "full" {
		return err
	}
	_, err = run.Run(ctx, run.Cmd{Args: []string{"qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -q -P 7 0 %d", b.size), "-c", "flush", name}})
	return err
}

func (w cowWay) serveQcow2(ctx context.Context, image, socket string) (*ioServer, error) {
	if w.kind == blockdev.NBD {
		return startPeer(ctx, socket, []string{"qemu-nbd", "--format=qcow2", "--cache=none", "--aio=io_uring", "--discard=unmap", "--persistent", "--shared=8", "--socket=" + socket, image})
	}
	return startPeer(ctx, socket, []string{
		"qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=file,cache.direct=on,aio=io_uring,discard=unmap,filename=" + image,
		"--blockdev", "driver=qcow2,node-name=image,file=file,discard=unmap",
		"--export", "type=vhost-user-blk,id=export,node-name=image,writable=on,addr.type=unix,addr.path=" + socket,
	})
}

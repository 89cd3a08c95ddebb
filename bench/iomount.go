package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"holdfast/internal/run"
)

// mountWay is a way through a loop device: what a container is given, and what one
// could do instead.
type mountWay struct {
	loop   []string          // arguments of losetup
	format []string          // mkfs and its arguments; nil: the device itself is the path
	queue  map[string]string // settings of the device in /sys/block/…/queue
	dirty  bool              // leaves pages to write, which the next path is not to wait for
	all    bool              // takes flushes as well
}

var (
	directLoop = []string{"--direct-io=on"}
	makeExt4   = []string{"mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"}
	makeXFS    = []string{"mkfs.xfs", "-q", "-f", "-K", "-s", "size=4096", "-m", "reflink=1,rmapbt=1"}
)

// mountWays are the paths by a loop device. "mount" is what our attacher for
// containers does: the file is the same whichever mount namespace it is seen in.
func mountWays() []ioWay {
	ways := []struct {
		key, name string
		way       mountWay
	}{
		{"pool", "a file in a pool of XFS in an image", mountWay{loop: directLoop, format: makeXFS}},
		{"loop", "a loop device with direct I/O", mountWay{loop: directLoop}},
		{"mount", "a container's mount: ext4, loop with direct I/O", mountWay{loop: directLoop, format: makeExt4, all: true}},
		{"mount-xfs", "a container's mount: XFS, loop with direct I/O", mountWay{loop: directLoop, format: makeXFS, all: true}},
		{"mount-4k", "the same ext4, loop with sectors of 4096 bytes", mountWay{loop: append([]string{"--sector-size=4096"}, directLoop...), format: makeExt4}},
		{"mount-tuned", "the same ext4, loop without merges, statistics and throttled writeback", mountWay{loop: directLoop, format: makeExt4,
			queue: map[string]string{"nomerges": "2", "iostats": "0", "wbt_lat_usec": "0", "rotational": "0", "rq_affinity": "2"}}},
		{"mount-buffered", "losetup and mount by hand: ext4, loop through the page cache", mountWay{format: makeExt4, dirty: true, all: true}},
	}
	all := make([]ioWay, 0, len(ways))
	for _, w := range ways {
		takes := small
		if w.way.all {
			takes = func(j ioJob) bool { return small(j) || j.flush }
		}
		all = append(all, ioWay{w.key, w.name, takes, w.way.open})
	}
	return all
}

func (w mountWay) open(ctx context.Context, b *IO, p *ioPath) (err error) {
	m := &looped{b: b, image: filepath.Join(b.Dir, p.key+".image"), at: filepath.Join(b.Dir, p.key)}
	p.close = m.close
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
			p.close = nil
		}
	}()
	size := b.size / 2
	room := size
	if w.format != nil {
		room = size + size/8 + 400<<20 // the least that XFS takes, and its log
	}
	if err := m.attach(ctx, w, room, size); err != nil {
		return err
	}
	if err := m.set(w.queue); err != nil {
		return err
	}
	target := m.device
	if w.format != nil {
		if target, err = m.mount(ctx, w.format, size); err != nil {
			return err
		}
	}
	p.fioOn(b, size, "ioengine=io_uring", "direct=1", "filename="+target)
	if w.dirty {
		p.settle = func() error { return syncPath(m.image) }
	}
	return nil
}

// looped is an image behind a loop device, which may be mounted.
type looped struct {
	b       *IO
	image   string
	device  string
	at      string // mount point
	mounted bool
}

// attach makes the image and the device. An image without a file system is full of
// data, as a file in one is later: no first write is measured.
func (m *looped) attach(ctx context.Context, w mountWay, room, size int64) error {
	if w.format == nil {
		if err := fillImage(m.image, size); err != nil {
			return err
		}
	} else if _, err := run.Run(ctx, run.Cmd{Args: []string{"fallocate", "--length", fmt.Sprint(room), m.image}}); err != nil {
		return err
	}
	made, err := run.Run(ctx, run.Cmd{Args: append(append([]string{"losetup", "--find", "--show"}, w.loop...), m.image)})
	if err == nil {
		m.device = strings.TrimSpace(string(made.Stdout))
	}
	return err
}

func (m *looped) set(queue map[string]string) error {
	for name, value := range queue {
		path := filepath.Join("/sys/block", filepath.Base(m.device), "queue", name)
		if err := os.WriteFile(path, []byte(value), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// mount formats and mounts the device, and makes the file in it.
func (m *looped) mount(ctx context.Context, format []string, size int64) (file string, err error) {
	if err := os.Mkdir(m.at, 0o700); err != nil {
		return "", err
	}
	for _, args := range [][]string{append(format[:len(format):len(format)], m.device), {"mount", "-o", "nosuid,nodev", m.device, m.at}} {
		if _, err := run.Run(ctx, run.Cmd{Args: args}); err != nil {
			return "", err
		}
	}
	m.mounted = true
	file = filepath.Join(m.at, "file")
	return file, fillImage(file, size)
}

func (m *looped) close() error {
	ctx := context.Background() // also after the bench was told to end
	var errs []error
	if m.mounted {
		_, err := run.Run(ctx, run.Cmd{Args: []string{"umount", m.at}})
		errs = append(errs, err)
	}
	if m.device != "" {
		_, err := run.Run(ctx, run.Cmd{Args: []string{"losetup", "--detach", m.device}})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach/qmp"
	"holdfast/internal/guest"
	"holdfast/internal/guest/agent"
)

// Of the disks of a guest, all of the same size.
const (
	guestMiB   = 256
	guestQuick = 32 // likewise, of a smoke test
	// guestDir has, in the guest, our programs and the image that NBD servers there serve.
	guestDir   = "/mnt"
	guestImage = guestDir + "/image"
)

// guestJobs are what is measured in a guest unless other jobs are asked for.
const guestJobs = "randread-4k-qd1,randread-4k-qd32,randwrite-4k-qd1,randwrite-4k-qd32"

// guestWays are the paths to a guest's disk. The guest's root ports 1 to 3 are for the
// host's image, which all three have; port 0 has the disk for what is served inside.
func guestWays() []ioWay {
	return []ioWay{
		{"guest-virtio", "a guest's disk by QEMU itself, virtio-blk on the file", again, guestVirtio},
		{"guest-vhost", "a guest's disk by our worker, vhost-user-blk", again, guestVhost},
		{"guest-qsd-vhost", "a guest's disk by qemu-storage-daemon, vhost-user-blk", again, guestQSD},
		{"guest-nbd", "the kernel's NBD client on our worker, both in the guest", again, guestNBD},
		{"guest-qemu-nbd", "the kernel's NBD client on qemu-nbd, both in the guest", again, guestQemuNBD},
	}
}

// guestPairs are what is told of them. There are no goals: an emulated processor
// would miss or meet them.
func guestPairs() []ioPair {
	return []ioPair{
		{ours: "guest-vhost", beside: "guest-virtio"},
		{ours: "guest-vhost", beside: "guest-qsd-vhost"},
		{ours: "guest-qsd-vhost", beside: "guest-virtio"},
		{ours: "guest-nbd", beside: "guest-qemu-nbd"},
	}
}

var guestNotes = []string{
	"Ratios are medians of those of each round, in requests; their 95 % intervals come from the order of the rounds' ratios and assume nothing of how they are spread. There are no goals.",
	"fio runs in the guest (libaio, direct I/O), whose one processor is emulated (-accel tcg): most of the time of each request is that of the guest's own code, the same on all paths, and ratios are nearer to 1 than with KVM. CPU is fio's in the guest; what a server costs its host is seen in `holdfast bench io`.",
	"All jobs on all paths of a round are one run of fio, one after the other, the paths in another order each round.",
	"The guest's disks of vhost-user-blk and virtio-blk are the same file of the host, with one queue, direct I/O and io_uring.",
	"Our worker and qemu-nbd, which serve the kernel's NBD client over one connection on a unix socket, run in the guest: this host's kernel has no NBD client. They are emulated as the client is, so this ratio holds one server's code against the other's. Both serve the same file, on ext4 on a disk of the guest (a file of the host, through its page cache), with direct I/O and io_uring.",
}

// inGuest sets what is measured with a guest.
func (b *IO) inGuest() {
	b.ways, b.pairs, b.notes = guestWays(), guestPairs(), guestNotes
	b.size = guestMiB << 20
	if b.Each == 0 {
		b.Each = 300 * time.Millisecond
	}
	if b.Quick {
		b.size = guestQuick << 20
	}
	switch {
	case b.Only != "":
	case b.Quick:
		b.Only = "randread-4k-qd1,randwrite-4k-qd32"
	default:
		b.Only = guestJobs
	}
}

// openGuest starts the guest that fio runs in.
func (b *IO) openGuest(ctx context.Context) (err error) {
	b.guest, err = guest.Open(ctx, guest.Options{SharedMemory: true, Disks: []int64{b.size + 256<<20}})
	return err
}

// measureGuest takes all rounds.
func (b *IO) measureGuest(ctx context.Context, jobs []ioJob) error {
	jobs = slices.DeleteFunc(jobs, func(j ioJob) bool { return !again(j) })
	taken := map[string]map[string][]ioSample{} // by job and path
	for _, j := range jobs {
		taken[j.name] = map[string][]ioSample{}
	}
	for round := range b.Rounds {
		b.say("round %d of %d in the guest", round+1, b.Rounds)
		if err := b.guestRound(ctx, round, jobs, taken); err != nil {
			return err
		}
	}
	for _, j := range jobs {
		b.tell(j, taken[j.name])
	}
	return nil
}

// guestRound has each job done on each path, one after the other, by one fio: the
// emulated processor takes longer to start it than for a job.
func (b *IO) guestRound(ctx context.Context, round int, jobs []ioJob, taken map[string]map[string][]ioSample) error {
	var sections strings.Builder
	var flushes []bool
	for _, j := range jobs {
		for turn := range b.paths {
			fmt.Fprintf(&sections, "%s\nstonewall=1\nfilename=%s\n", j.text, b.paths[(round+turn)%len(b.paths)].node)
			flushes = append(flushes, j.flush)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute+2*time.Duration(len(flushes))*b.Each)
	defer cancel()
	var out bytes.Buffer
	file := jobFile(sections.String(), b.Each, b.size, "ioengine=libaio", "direct=1", "thread=1")
	if err := b.guest.Command(ctx, agent.Command{Args: []string{"fio", "--output-format=json", "-"}}, strings.NewReader(file), &out, nil); err != nil {
		return err
	}
	samples, err := parseFio(out.Bytes(), flushes...)
	if err != nil {
		return err
	}
	for i, s := range samples {
		of, key := taken[jobs[i/len(b.paths)].name], b.paths[(round+i)%len(b.paths)].key
		of[key] = append(of[key], s.ioSample)
	}
	return nil
}

func guestVirtio(ctx context.Context, b *IO, p *ioPath) error {
	const name = "virtio"
	direct := func(more qmp.Args) qmp.Args {
		more["discard"], more["cache"] = "unmap", qmp.Args{"direct": true, "no-flush": false}
		return more
	}
	err := b.guest.Do(ctx, "blockdev-add", direct(qmp.Args{"driver": "raw", "node-name": name,
		"file": direct(qmp.Args{"driver": "file", "filename": b.image, "aio": "io_uring", "locking": "off"})}))
	if err != nil {
		return err
	}
	if err := b.guest.Do(ctx, "device_add", qmp.Args{"driver": "virtio-blk-pci", "id": name, "drive": name, "serial": name, "bus": "rp1", "num-queues": 1}); err != nil {
		return err
	}
	p.node, err = b.guest.Disk(ctx, name)
	return err
}

func guestVhost(ctx context.Context, b *IO, p *ioPath) error {
	s, err := startOwn(b.Program, ServeOptions{Image: b.image, Kind: blockdev.VhostUser})
	if err != nil {
		return err
	}
	return p.plugServed(ctx, b, s, string(benchID[len(benchID)-20:]), "rp2") // VIRTIO_BLK_ID_BYTES
}

func guestQSD(ctx context.Context, b *IO, p *ioPath) error {
	s, err := startQSD(ctx, b.image, b.socket(p))
	if err != nil {
		return err
	}
	return p.plugServed(ctx, b, s, "vhost_user_blk", "rp3") // the serial of all its disks
}

// plugServed gives the guest a served disk, which it finds by its serial.
func (p *ioPath) plugServed(ctx context.Context, b *IO, s *ioServer, serial, port string) error {
	p.close = s.stop
	err := b.guest.Do(ctx, "chardev-add", qmp.Args{"id": p.key, "backend": qmp.Args{"type": "socket", "data": qmp.Args{
		"addr": qmp.Args{"type": "unix", "data": qmp.Args{"path": s.socket}}, "server": false}}})
	if err == nil {
		err = b.guest.Do(ctx, "device_add", qmp.Args{"driver": "vhost-user-blk-pci", "id": p.key, "chardev": p.key, "num-queues": 1, "bus": port})
	}
	if err == nil {
		p.node, err = b.guest.Disk(ctx, serial)
	}
	if err != nil {
		return errors.Join(err, s.stop())
	}
	return nil
}

// guestServed makes what NBD servers in the guest serve, once.
func (b *IO) guestServed(ctx context.Context) error {
	disk, err := b.guest.Disk(ctx, "disk0")
	if err != nil {
		return err
	}
	return b.guest.Run(ctx, "sh", "-c", fmt.Sprintf("[ -e %[3]s ] && exit; mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 %[2]s && mount %[2]s %[1]s && modprobe nbd && dd if=/dev/zero of=%[3]s bs=1M count=%[4]d conv=fsync 2>&1",
		guestDir, disk, guestImage, b.size>>20))
}

func guestNBD(ctx context.Context, b *IO, p *ioPath) error {
	const device, said = "/dev/nbd0", "/tmp/served"
	if err := b.guestServed(ctx); err != nil {
		return err
	}
	for _, name := range []string{filepath.Base(b.Program), "holdfast-blockd"} {
		if err := sendProgram(ctx, b.guest, filepath.Join(filepath.Dir(b.Program), name), filepath.Join(guestDir, name)); err != nil {
			return err
		}
	}
	serve := strings.Join([]string{filepath.Join(guestDir, filepath.Base(b.Program)), "bench", "io", "--serve", guestImage, "--kind", string(blockdev.NBD), "--device", device}, " ")
	// It serves until the guest ends.
	err := b.guest.Run(ctx, "sh", "-c", serve+" >"+said+" 2>"+said+".log </dev/null & while kill -0 $! 2>/dev/null; do [ -s "+said+" ] && exit; sleep 0.05; done; cat "+said+".log; exit 1")
	p.node = device
	return err
}

func guestQemuNBD(ctx context.Context, b *IO, p *ioPath) error {
	const device = "/dev/nbd1"
	if err := b.guest.Install(ctx, "qemu-nbd"); err != nil {
		return err
	}
	if err := b.guestServed(ctx); err != nil {
		return err
	}
	err := b.guest.Run(ctx, "qemu-nbd", "--fork", "--connect="+device, "--socket=/tmp/qemu-nbd.sock", "--format=raw", "--cache=none", "--aio=io_uring", "--discard=unmap", guestImage)
	if err == nil {
		// It forks before the kernel has the size.
		err = b.guest.Run(ctx, "sh", "-c", "while [ $(cat /sys/class/block/nbd1/size) = 0 ]; do sleep 0.02; done")
	}
	p.node = device
	return err
}

package powercut

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/run"
)

const (
	// patience is how long the rig waits for a process to start or to end.
	patience = time.Minute
	// longest is how long one rig may live.
	longest = time.Hour
)

// Rig is a filesystem whose every write is recorded. Dir and Mark are for
// concurrent use; the rest belongs to one goroutine.
type Rig struct {
	Dir string // the mounted filesystem, until Stop

	size    int64
	make    []string // makes the filesystem, before the disk's name
	mount   []string // mounts it, before the device
	home    string   // the rig's own files
	log     *os.File
	device  string // loop device under Dir; "" when stopped
	pid     int    // of the storage daemon
	kill    context.CancelFunc
	gone    chan error        // its end
	entries []entry           // after Stop
	base    *base             // after the first Rebuild
	rebuilt int               // how many disks were rebuilt
	cuts    map[string]string // loop devices under rebuilt disks, by directory
}

// Moment is a point in time of the disk; later ones are greater.
type Moment int64

// Start makes a rig with an XFS filesystem of size bytes (at least 300 MiB;
// sparse). Everything is taken down when the test ends.
func Start(t testing.TB, size int64) *Rig {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.XFS)
	return start(t, &Rig{
		size: size,
		make: []string{"mkfs.xfs", "-q", "-m", "reflink=1,rmapbt=1"},
		// Also beside another with the same UUID.
		mount: []string{"mount", "-t", "xfs", "-o", "nouuid"},
	})
}

// StartExt4 is Start with an ext4.
func StartExt4(t testing.TB, size int64) *Rig {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Ext4)
	return start(t, &Rig{
		size: size,
		// What the kernel would initialise later would be in the log.
		make:  []string{"mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"},
		mount: []string{"mount", "-t", "ext4"},
	})
}

func start(t testing.TB, r *Rig) *Rig {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.PowerCut)
	r.home, r.cuts = t.TempDir(), map[string]string{}
	r.Dir = r.path("live")
	if err := r.start(); err != nil {
		t.Fatal(errors.Join(fmt.Errorf("power-cut rig: %w", err), r.stop()))
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
		// What is read, or thrown away, needs no care.
		_ = r.log.Close()
		if r.base != nil {
			_ = r.base.file.Close()
		}
	})
	return r
}

func (r *Rig) path(name string) string { return filepath.Join(r.home, name) }

func (r *Rig) start() error {
	// The filesystem is made before the log begins: the log tells of the test alone.
	if err := makeFile(r.path("disk"), r.size); err != nil {
		return err
	}
	if err := command(append(slices.Clone(r.make), r.path("disk"))...); err != nil {
		return err
	}
	if err := command("cp", "--sparse=always", r.path("disk"), r.path("pristine")); err != nil {
		return err
	}
	for _, name := range []string{"log", "export"} {
		if err := makeFile(r.path(name), 0); err != nil {
			return err
		}
	}
	var err error
	if r.log, err = os.Open(r.path("log")); err != nil {
		return err
	}
	if err := r.startDaemon(); err != nil {
		return err
	}
	if r.device, err = loopOver(r.path("export")); err != nil {
		return err
	}
	return r.mountAt(r.device, r.Dir)
}

// startDaemon starts the process that serves the disk and logs what is done to
// it, and waits until it does. It need not flush to this host's disk: nobody
// cuts the host's power. Without discard=unmap it would drop discards, and with
// them the zeroing that the loop driver asks for by punching holes.
func (r *Rig) startDaemon() error {
	ctx, cancel := context.WithCancel(context.Background())
	r.kill, r.gone = cancel, make(chan error, 1)
	args := []string{
		"qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=disk,discard=unmap,cache.no-flush=on,filename=" + r.path("disk"),
		"--blockdev", "driver=file,node-name=log,cache.no-flush=on,filename=" + r.path("log"),
		"--blockdev", fmt.Sprintf("driver=blklogwrites,node-name=logged,file=disk,log=log,log-sector-size=%d,discard=unmap", sector),
		"--export", "type=fuse,id=disk,node-name=logged,writable=on,growable=off,allow-other=off,mountpoint=" + r.path("export"),
		"--pidfile", r.path("pid"),
	}
	go func() {
		_, err := run.Run(ctx, run.Cmd{Args: args, Timeout: longest})
		r.gone <- err
	}()
	return until(func() (bool, error) {
		select {
		case err := <-r.gone:
			r.gone <- err
			return false, fmt.Errorf("qemu-storage-daemon ended: %w", err)
		default:
		}
		text, err := os.ReadFile(r.path("pid"))
		if err != nil || !strings.HasSuffix(string(text), "\n") {
			return false, nil // not yet
		}
		r.pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return true, err
	})
}

// Mark tells the present moment. What an fsync that has returned made durable
// lies before it.
func (r *Rig) Mark() Moment {
	// An entry that was written makes the log at least as long as itself.
	info, err := r.log.Stat()
	if err != nil {
		panic(err) // fstat of an open file
	}
	return Moment(info.Size())
}

// Stop ends the recording: it unmounts Dir and everything mounted below it (the
// test's processes must be gone) and reads the log. It may be called again.
func (r *Rig) Stop(t testing.TB) {
	t.Helper()
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if r.entries != nil {
		return
	}
	var err error
	if r.entries, err = readLog(r.log, int64(r.Mark()), r.size); err != nil {
		t.Fatalf("power-cut rig: log: %v", err)
	}
}

// stop takes down what start made, as far as it came.
func (r *Rig) stop() error {
	err := takeDown(r.Dir, r.device)
	r.device = ""
	if r.kill == nil {
		return err
	}
	if r.pid != 0 {
		err = errors.Join(err, ignoreGone(syscall.Kill(r.pid, syscall.SIGTERM)))
	} else {
		r.kill()
	}
	select {
	case end := <-r.gone:
		if r.pid != 0 {
			err = errors.Join(err, end)
		}
	case <-time.After(patience):
		r.kill()
		err = errors.Join(err, errors.New("qemu-storage-daemon did not end when asked"), <-r.gone)
	}
	r.kill()
	r.kill, r.pid = nil, 0
	// A daemon that was killed leaves its mount behind.
	return errors.Join(err, takeDown(r.path("export"), ""))
}

// takeDown unmounts what is mounted at dir and below it and what is mounted
// elsewhere from a file below it, the latest first, and detaches the loop
// devices over files below dir, and device.
func takeDown(dir, device string) error {
	loops, err := loopsUnder(dir)
	if err != nil {
		return err
	}
	if device != "" {
		loops = append(loops, device)
	}
	points, err := mountsOf(dir, loops)
	if err != nil {
		return err
	}
	var errs []error
	// A device that is mounted goes with its last mount, and only then lets go of
	// the file, which may lie on the next mount to be taken down.
	for _, l := range loops {
		errs = append(errs, command("losetup", "-d", l))
	}
	for _, p := range points {
		errs = append(errs, unmount(p))
	}
	return errors.Join(errs...)
}

// mountsOf tells the mount points at dir, below it, and of devices, the latest
// first.
func mountsOf(dir string, devices []string) ([]string, error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	plain := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var points []string
	for line := range strings.Lines(string(table)) {
		place, origin, _ := strings.Cut(line, " - ")
		fields, source := strings.Fields(place), strings.Fields(origin)
		if len(fields) < 5 || len(source) < 2 {
			return nil, fmt.Errorf("mountinfo: %q", line)
		}
		point := plain.Replace(fields[4])
		if point == dir || strings.HasPrefix(point, dir+"/") || slices.Contains(devices, source[1]) {
			points = append(points, point)
		}
	}
	slices.Reverse(points)
	return points, nil
}

// loopsUnder tells the loop devices over files below dir.
func loopsUnder(dir string) ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var loops []string
	for _, f := range files {
		backing, err := os.ReadFile(f)
		if err == nil && strings.HasPrefix(string(backing), dir+"/") { // an error: detached meanwhile
			loops = append(loops, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(f))))
		}
	}
	return loops, nil
}

// loopOver makes a loop device over a file.
func loopOver(file string) (string, error) {
	var device string
	err := until(func() (bool, error) {
		// Another process may take the free number first: EBUSY, and again.
		res, err := run.Run(context.Background(), run.Cmd{Args: []string{"losetup", "--find", "--show", file}})
		if err != nil && strings.Contains(string(res.Stderr), "busy") {
			return false, nil
		}
		device = strings.TrimSpace(string(res.Stdout))
		return true, err
	})
	return device, err
}

func (r *Rig) mountAt(device, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return command(append(slices.Clone(r.mount), device, dir)...)
}

// unmount waits for a mount that a process just ended still holds.
func unmount(point string) error {
	return until(func() (bool, error) {
		res, err := run.Run(context.Background(), run.Cmd{Args: []string{"umount", point}})
		if err != nil && strings.Contains(string(res.Stderr), "busy") {
			return false, nil
		}
		return true, err
	})
}

func makeFile(name string, size int64) error {
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(name, size)
}

func command(args ...string) error {
	_, err := run.Run(context.Background(), run.Cmd{Args: args})
	return err
}

func ignoreGone(err error) error {
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}

// until polls until done says yes or fails.
func until(done func() (bool, error)) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return errors.New("timed out (is it still in use?)")
		}
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/guest"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
)

// tools work on mounted filesystems by system calls alone.
var tools = filesystem.NewTools()

// longestWait bounds how long a request waits for a device.
const longestWait = 30 * time.Second

var actions = map[string]func(*server, guest.Request) (guest.Answer, error){
	guest.Mount: (*server).mount, guest.Unmount: (*server).unmount, guest.Grow: (*server).grow, guest.Sync: (*server).sync,
	guest.Trim: (*server).trim, guest.Freeze: (*server).freeze, guest.Thaw: (*server).thaw, guest.Stat: (*server).stat,
}

func until(r guest.Request) time.Time {
	wait := time.Duration(min(max(r.TimeoutMs, 0), longestWait.Milliseconds())) * time.Millisecond
	return time.Now().Add(wait)
}

// mount mounts a disk at a path: nosuid and nodev, since what is on it came from
// elsewhere. It is there already is success.
func (s *server) mount(r guest.Request) (guest.Answer, error) {
	if err := attach.CheckPath(r.Path); err != nil {
		return guest.Answer{}, failed(guest.CodeInvalid, err.Error())
	}
	t := filesystem.Type(r.Filesystem)
	if !t.Valid() || t == filesystem.None {
		return guest.Answer{}, failed(guest.CodeInvalid, "the filesystem")
	}
	d, err := await(r.Serial, 0, until(r))
	if err != nil {
		return guest.Answer{}, err
	}
	top, err := topAt(r.Path)
	if err != nil {
		return guest.Answer{}, err
	}
	if top != nil {
		return guest.Answer{}, d.isAt(*top, r.ReadOnly)
	}
	root, err := sys.OpenPath("/")
	if err != nil {
		return guest.Answer{}, err
	}
	defer root.Close()
	at, err := sys.OpenBeneath(root, strings.TrimPrefix(r.Path, "/"), sys.Walk{Create: true})
	if err != nil {
		return guest.Answer{}, placeError(err)
	}
	defer at.Close()
	m, err := sys.NewMount(sys.Filesystem{Device: d.node(), Type: string(t), ReadOnly: r.ReadOnly}, sys.MountAttr{ReadOnly: r.ReadOnly, NoSuid: true, NoDev: true})
	if err != nil {
		return guest.Answer{}, err
	}
	defer m.Close()
	return guest.Answer{}, sys.MoveMount(m, at)
}

// topAt is the mount that is seen at a path, nil for none.
func topAt(path string) (*attach.Mount, error) {
	all, err := attach.Mounts()
	if err != nil {
		return nil, err
	}
	var top *attach.Mount
	for n := range all {
		if all[n].Path == path {
			top = &all[n]
		}
	}
	return top, nil
}

// isAt is nil when a mount is the disk's, in a mode.
func (d disk) isAt(m attach.Mount, readOnly bool) error {
	all, err := d.mounts()
	if err != nil {
		return err
	}
	for _, own := range all {
		if own.ID == m.ID && (own.ReadOnly || own.ReadOnlyFS) == readOnly {
			return nil
		}
		if own.ID == m.ID {
			return failed(guest.CodeBusy, "it is mounted there in another mode")
		}
	}
	return failed(guest.CodeBusy, "something else is mounted at the path")
}

func placeError(err error) error {
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENOTDIR) {
		return failed(guest.CodeInvalid, "the path leads through a symbolic link, or something that is no directory")
	}
	return err
}

// unmount unmounts a disk wherever it is mounted, and makes sure that nobody else
// of the guest has it. No such disk, and not mounted, is success.
func (s *server) unmount(r guest.Request) (guest.Answer, error) {
	d, err := find(r.Serial)
	var none *refusal
	if errors.As(err, &none) && none.Code == guest.CodeNotFound {
		return guest.Answer{}, nil
	}
	if err != nil {
		return guest.Answer{}, err
	}
	if err := s.freezes.thaw(r.Serial); err != nil {
		return guest.Answer{}, err
	}
	all, err := d.mounts()
	if err != nil {
		return guest.Answer{}, err
	}
	if r.Lazy {
		return guest.Answer{}, d.unmountLazily(all)
	}
	if len(all) > 1 { // all or none
		if err := inUse(all); err != nil {
			return guest.Answer{}, err
		}
	}
	for n := len(all) - 1; n >= 0; n-- {
		if err := d.unmountOne(all[n]); err != nil {
			return guest.Answer{}, err
		}
	}
	held, err := sys.DeviceHeld(d.node())
	if err == nil && held {
		err = failed(guest.CodeBusy, "the device is in use by the guest's kernel: mounted in another namespace (a container), swap, or part of another device")
	}
	return guest.Answer{}, err
}

func (d disk) unmountOne(m attach.Mount) error {
	if !d.visible(m) {
		return failed(guest.CodeBusy, "another mount covers it at "+m.Path)
	}
	err := sys.Unmount(m.Path)
	if errors.Is(err, syscall.EBUSY) {
		if used := inUse([]attach.Mount{m}); used != nil {
			return used
		}
		return failed(guest.CodeBusy, "it is in use at "+m.Path)
	}
	return err
}

// unmountLazily makes what was written durable and takes the mounts out of sight,
// whoever has files open.
func (d disk) unmountLazily(all []attach.Mount) error {
	var failures error
	for n := len(all) - 1; n >= 0; n-- {
		if !d.visible(all[n]) {
			failures = errors.Join(failures, failed(guest.CodeBusy, "another mount covers it at "+all[n].Path))
			continue
		}
		failures = errors.Join(failures, syncAt(all[n].Path), sys.UnmountLazy(all[n].Path))
	}
	return failures
}

func syncAt(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return sys.SyncFilesystem(f)
}

// inUse is the refusal that names who has files of mounts open; nil for nobody.
func inUse(all []attach.Mount) error {
	for _, m := range all {
		place, err := sys.PlaceBehind(m.Path)
		if err != nil {
			continue
		}
		var holders []guest.Holder
		for _, pid := range attach.HolderPids(place.Device) {
			name, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
			holders = append(holders, guest.Holder{Pid: pid, Name: strings.TrimSpace(string(name))})
		}
		if len(holders) > 0 {
			return &refusal{guest.Failure{Code: guest.CodeBusy, Holders: holders}}
		}
	}
	return nil
}

// grow grows the filesystem to its device, once that has the size that it was given.
func (s *server) grow(r guest.Request) (guest.Answer, error) {
	if _, _, err := mounted(r.Serial); err != nil {
		return guest.Answer{}, err
	}
	if _, err := await(r.Serial, r.Size, until(r)); err != nil {
		return guest.Answer{}, err
	}
	_, m, err := mounted(r.Serial)
	if err != nil {
		return guest.Answer{}, err
	}
	if s.freezes.frozen(r.Serial) {
		return guest.Answer{}, failed(guest.CodeBusy, "it is frozen")
	}
	t := filesystem.Type(m.Type)
	err = tools.GrowMounted(context.Background(), m.Path, t)
	if errors.Is(err, filesystem.ErrCannotGrowMounted) || errors.Is(err, filesystem.ErrReadOnly) {
		return guest.Answer{}, failed(guest.CodeUnsupported, err.Error())
	}
	if err != nil {
		return guest.Answer{}, err
	}
	size, err := tools.SizeMounted(context.Background(), m.Path, t)
	return guest.Answer{Size: size}, err
}

func (s *server) sync(r guest.Request) (guest.Answer, error) {
	_, m, err := mounted(r.Serial)
	if err != nil {
		return guest.Answer{}, err
	}
	return guest.Answer{}, tools.SyncMounted(context.Background(), m.Path, filesystem.Type(m.Type))
}

func (s *server) trim(r guest.Request) (guest.Answer, error) {
	if r.From < 0 || r.Length < 1 {
		return guest.Answer{}, failed(guest.CodeInvalid, "the range")
	}
	_, m, err := mounted(r.Serial)
	if err != nil {
		return guest.Answer{}, err
	}
	done, err := tools.TrimMounted(context.Background(), m.Path, filesystem.Type(m.Type), r.From, r.Length)
	return guest.Answer{Trim: &guest.Trimmed{Discarded: done.Discarded, Next: done.Next, Done: done.Done}}, err
}

func (s *server) freeze(r guest.Request) (guest.Answer, error) {
	if r.TimeoutMs < 1 || r.TimeoutMs > longestFreeze.Milliseconds() {
		return guest.Answer{}, failed(guest.CodeInvalid, fmt.Sprintf("the time-out must be from 1 ms to %s", longestFreeze))
	}
	d, m, err := mounted(r.Serial)
	if err != nil {
		return guest.Answer{}, err
	}
	return guest.Answer{}, s.freezes.freeze(d.serial, m.Path, time.Duration(r.TimeoutMs)*time.Millisecond)
}

func (s *server) thaw(r guest.Request) (guest.Answer, error) {
	return guest.Answer{}, s.freezes.thaw(r.Serial)
}

func (s *server) stat(r guest.Request) (guest.Answer, error) {
	_, m, err := mounted(r.Serial)
	if err != nil {
		return guest.Answer{}, err
	}
	u, err := tools.UsageMounted(context.Background(), m.Path, filesystem.Type(m.Type))
	return guest.Answer{
		Usage:  &guest.Usage{Total: u.Total, Used: u.Used, Free: u.Free, Inodes: u.Inodes, UsedInodes: u.UsedInodes, FreeInodes: u.FreeInodes},
		Frozen: s.freezes.frozen(r.Serial),
	}, err
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

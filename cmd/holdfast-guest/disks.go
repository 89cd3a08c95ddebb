package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/guest"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
)

const (
	// mostListed and mostPoints bound a list, which has to fit into one message.
	mostListed = 128
	mostPoints = 4
	// lookEvery is how often the kernel is asked for what is to come.
	lookEvery = 5 * time.Millisecond
)

// disk is one that the kernel has.
type disk struct {
	name   string // "vdb"
	serial string
	number uint64 // of the device
}

func (d disk) node() string { return "/dev/" + d.name }

// disks tells all that have serial numbers.
func disks() ([]disk, error) {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, err
	}
	var all []disk
	for _, e := range entries {
		d := disk{name: e.Name(), serial: serialOf(e.Name())}
		if d.serial == "" {
			continue
		}
		if d.number, err = numberOf(d.name); err != nil {
			if errors.Is(err, fs.ErrNotExist) { // it has gone meanwhile
				continue
			}
			return nil, err
		}
		all = append(all, d)
	}
	return all, nil
}

// serialOf reads the serial number of a disk: virtio-blk's own, NVMe's, or SCSI's
// page 0x80 (SPC-4, 7.8.10: four bytes of header).
func serialOf(name string) string {
	for _, file := range []string{"serial", "device/serial"} {
		if text, err := os.ReadFile(filepath.Join("/sys/block", name, file)); err == nil {
			if serial := strings.TrimSpace(string(text)); guest.ValidSerial(serial) {
				return serial
			}
		}
	}
	if page, err := os.ReadFile(filepath.Join("/sys/block", name, "device/vpd_pg80")); err == nil && len(page) > 4 {
		if serial := strings.Trim(string(page[4:]), " \x00"); guest.ValidSerial(serial) {
			return serial
		}
	}
	return ""
}

func numberOf(name string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join("/sys/block", name, "dev"))
	if err != nil {
		return 0, err
	}
	major, minor, _ := strings.Cut(strings.TrimSpace(string(text)), ":")
	a, err := strconv.Atoi(major)
	if err != nil {
		return 0, err
	}
	b, err := strconv.Atoi(minor)
	return sys.Device(a, b), err
}

// size is the device's, in bytes; sysfs counts in 512.
func (d disk) size() (int64, error) {
	text, err := os.ReadFile(filepath.Join("/sys/block", d.name, "size"))
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return sectors * 512, err
}

func (d disk) readOnly() bool {
	text, err := os.ReadFile(filepath.Join("/sys/block", d.name, "ro"))
	return err == nil && strings.TrimSpace(string(text)) == "1"
}

// find gives the disk of a serial number.
func find(serial string) (disk, error) {
	all, err := disks()
	if err != nil {
		return disk{}, err
	}
	if at := slices.IndexFunc(all, func(d disk) bool { return d.serial == serial }); at >= 0 {
		return all[at], nil
	}
	return disk{}, failed(guest.CodeNotFound, "")
}

// await gives the disk of a serial number once it is there with a size, in bytes,
// and can be opened.
func await(serial string, size int64, until time.Time) (disk, error) {
	for {
		d, err := find(serial)
		if err == nil {
			var have int64
			if have, err = d.size(); err == nil && have < max(size, 1) {
				err = failed(guest.CodeFailed, "the disk has "+strconv.FormatInt(have, 10)+" bytes, and more are to come")
			}
			if err == nil {
				_, err = os.Stat(d.node())
			}
		}
		if err == nil || !time.Now().Before(until) {
			return d, err
		}
		time.Sleep(lookEvery)
	}
}

// mounts tells where a disk's filesystem is mounted in this namespace, in the order
// in which that was done. A btrfs has no device's number: its source is the node.
func (d disk) mounts() ([]attach.Mount, error) {
	all, err := attach.Mounts()
	return slices.DeleteFunc(all, func(m attach.Mount) bool {
		if m.Device == d.number {
			return false
		}
		if m.Type != string(filesystem.Btrfs) {
			return true
		}
		place, err := sys.PlaceBehind(m.Source)
		return err != nil || !place.IsBlock() || place.RDevice != d.number
	}), err
}

// visible reports whether a path leads to a mount of the disk, and not to one that
// covers it.
func (d disk) visible(m attach.Mount) bool {
	top, err := topAt(m.Path)
	if err != nil || top == nil || top.ID != m.ID {
		return false
	}
	place, err := sys.PlaceBehind(m.Path)
	return err == nil && place.MountRoot && (place.Device == d.number || m.Type == string(filesystem.Btrfs))
}

// mounted gives a mount of a disk that can be reached by its path, of a filesystem
// that we know.
func mounted(serial string) (disk, attach.Mount, error) {
	d, err := find(serial)
	if err != nil {
		return d, attach.Mount{}, err
	}
	all, err := d.mounts()
	if err != nil {
		return d, attach.Mount{}, err
	}
	at := slices.IndexFunc(all, d.visible)
	if at < 0 {
		return d, attach.Mount{}, failed(guest.CodeNotMounted, "")
	}
	if t := filesystem.Type(all[at].Type); !t.Valid() || t == filesystem.None {
		return d, all[at], failed(guest.CodeUnsupported, "its filesystem is "+all[at].Type)
	}
	return d, all[at], nil
}

func list() (guest.Answer, error) {
	all, err := disks()
	if err != nil {
		return guest.Answer{}, err
	}
	var a guest.Answer
	for _, d := range all[:min(len(all), mostListed)] {
		size, err := d.size()
		if err != nil {
			continue
		}
		mounts, err := d.mounts()
		if err != nil {
			return a, err
		}
		one := guest.Disk{Serial: d.serial, Name: d.name, Size: size, ReadOnly: d.readOnly()}
		for _, m := range mounts[:min(len(mounts), mostPoints)] {
			one.Mounts = append(one.Mounts, guest.Point{Path: m.Path, Filesystem: m.Type, ReadOnly: m.ReadOnly || m.ReadOnlyFS})
		}
		a.Disks = append(a.Disks, one)
	}
	return a, nil
}

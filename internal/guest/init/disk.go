package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// disk waits until there is a disk with a serial number and at least a number of
// 512-byte sectors, and prints its node. It wakes at the kernel's events and runs
// no program: what waits must not slow down what it waits for.
func disk(args []string) error { return await(args, io.Discard) }

// disks is disk for several serial numbers; it prints nothing.
func disks(serials []string) error {
	for _, s := range serials {
		if _, err := find(s, 1, io.Discard); err != nil {
			return err
		}
	}
	return nil
}

// watch is disk, but says when it has begun to look.
func watch(args []string) error { return await(args, os.Stdout) }

func await(args []string, begun io.Writer) error {
	if len(args) == 0 || len(args) > 2 {
		return errors.New("usage: SERIAL [SECTORS]")
	}
	least := int64(1)
	if len(args) == 2 {
		var err error
		if least, err = strconv.ParseInt(args[1], 10, 64); err != nil {
			return err
		}
	}
	name, err := find(args[0], least, begun)
	if err == nil {
		fmt.Println("/dev/" + name)
	}
	return err
}

func find(serial string, least int64, begun io.Writer) (name string, err error) {
	events, err := listen()
	if err != nil {
		return "", err
	}
	defer unix.Close(events)
	fmt.Fprintln(begun, "watching")
	for buf := make([]byte, 8<<10); ; {
		if name := findDisk(serial, least); name != "" {
			return name, nil
		}
		// An event that came before there was room for it is lost (ENOBUFS): look again.
		_, _, err := unix.Recvfrom(events, buf, 0)
		if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENOBUFS) {
			return "", fmt.Errorf("wait for an event of the kernel: %w", err)
		}
	}
}

// lookAgain is how long no event may come before the disks are looked at anyway.
const lookAgain = 250 * time.Millisecond

// listen opens the kernel's events about devices (netlink(7),
// NETLINK_KOBJECT_UEVENT).
func listen() (int, error) {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return -1, err
	}
	wait := unix.NsecToTimeval(lookAgain.Nanoseconds())
	return s, errors.Join(unix.Bind(s, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}),
		unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait))
}

// findDisk gives the name of the disk with a serial number, when it is large enough.
func findDisk(serial string, least int64) string {
	disks, _ := filepath.Glob("/sys/block/[sv]d*")
	for _, d := range disks {
		if serialOf(d) != serial {
			continue
		}
		b, err := os.ReadFile(filepath.Join(d, "size"))
		if err != nil {
			continue
		}
		if sectors, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && sectors >= least {
			return filepath.Base(d)
		}
	}
	return ""
}

// serialOf reads what virtio-blk and SCSI disks call themselves; the latter in a
// page with a header of four bytes (SPC-4, unit serial number).
func serialOf(disk string) string {
	if b, err := os.ReadFile(filepath.Join(disk, "serial")); err == nil {
		return strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile(filepath.Join(disk, "device", "vpd_pg80")); err == nil && len(b) > 4 {
		return strings.TrimSpace(string(b[4:]))
	}
	return ""
}

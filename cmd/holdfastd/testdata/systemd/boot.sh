#!/bin/sh
# Runs as the first process of new mount, pid, uts, ipc and cgroup namespaces:
# makes a root of its own over the machine's (nothing is written there) and
# becomes systemd, with no units but those of the test.
#   boot.sh DIR    DIR/units, DIR/bin and DIR/state are the test's
set -e
dir=$1
mkdir -p "$dir/over"
mount -t tmpfs tmpfs "$dir/over"
mkdir "$dir/over/upper" "$dir/over/work" "$dir/over/root"
root=$dir/over/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/over/upper,workdir=$dir/over/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/run/units" "$root/var/lib/holdfast" "$root/etc/holdfast" "$root/usr/local/bin"
cp -r "$dir/units/." "$root/run/units/"
cp "$dir/bin/"* "$root/usr/local/bin/"
cp "$dir/holdfastd.toml" "$root/etc/holdfast/"
mount --bind "$dir/state" "$root/var/lib/holdfast"
mkdir "$root/run/old"
cd "$root"
pivot_root . run/old
umount -l /run/old
exec env -i container=holdfast-test "PATH=$PATH" SYSTEMD_UNIT_PATH=/run/units \
	"$2" --system --unit=test.target --log-target=console --show-status=no

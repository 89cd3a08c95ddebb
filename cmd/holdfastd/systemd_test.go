package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
)

// TestSystemdRestart installs the unit file under a real systemd and restarts,
// kills, hangs and stops the service: the container that uses a volume, its
// mounts and the devices stay exactly as they are, and so does the worker of a
// volume that is served by a socket, under a client that writes all the time.
func TestSystemdRestart(t *testing.T) {
	m := bootSystemd(t)
	m.sh(`
		mkdir -p /tmp/box/rootfs/bin /tmp/box/rootfs/proc
		cp "$(command -v busybox)" /tmp/box/rootfs/bin/
		for a in sh sleep cat date; do ln -s busybox /tmp/box/rootfs/bin/$a; done
		cat > /tmp/box/config.json
		cd /tmp/box && runc run -d box < /dev/null > /dev/null 2>&1
		holdfast workspace create main
		holdfast volume create data --size 16
		holdfast attachment create data --holder sandbox:box --container box --mount-path /data
		runc exec -d box /bin/sh -c 'while date >> /data/clock; do sleep 0.01; done' < /dev/null > /dev/null 2>&1
		runc exec box /bin/sh -c 'echo kept > /data/file'`, sandbox)
	m.sh(`
		holdfast volume create shown --size 16
		holdfast attachment create shown --holder agent:writer --export nbd
		fio --name=writer --ioengine=nbd "--uri=nbd+unix:///?socket=$(ls /run/holdfast/serve-*/vol-*/data-*.sock)" \
			--rw=randwrite --bs=4k --size=16m --rate_iops=500 --time_based --runtime=3600 > /tmp/writer.log 2>&1 < /dev/null &
		echo $! > /tmp/writer.pid`)
	if own, daemon := m.sh("readlink /proc/1/ns/mnt"), m.sh("readlink /proc/$(systemctl show holdfastd -p MainPID --value)/ns/mnt"); own != daemon {
		t.Fatalf("the daemon has a mount namespace of its own: %s, systemd's is %s", daemon, own)
	}
	shown := filepath.Base(m.sh("ls -d /run/holdfast/serve-*/vol-*"))
	before, pid := m.snapshot(), m.show("MainPID")

	for _, step := range []struct {
		name, do string
		state    string
		restarts string
	}{
		{"restart", "systemctl restart holdfastd", "active", "0"},
		{"crash", "systemctl kill --kill-who=main -s KILL holdfastd", "active", "1"},
		{"hang", "systemctl kill --kill-who=main -s STOP holdfastd", "active", "2"},
		{"stop", "systemctl stop holdfastd", "inactive", ""},
		{"start", "systemctl start holdfastd", "active", ""},
	} {
		m.sh(step.do)
		m.until(step.name, func() bool {
			return m.show("ActiveState") == step.state && m.show("MainPID") != pid && (step.restarts == "" || m.show("NRestarts") == step.restarts)
		})
		pid = m.show("MainPID")
		if after := m.snapshot(); after != before {
			t.Errorf("after %s:\n%s\nbefore:\n%s", step.name, after, before)
		}
		m.sh(`n=$(runc exec box /bin/sh -c 'cat /data/clock' | wc -l)
			while test "$(runc exec box /bin/sh -c 'cat /data/clock' | wc -l)" -le $n; do :; done
			test "$(runc exec box /bin/sh -c 'cat /data/file')" = kept`)
		m.sh(`for n in 1 2 3; do
				last=$(stat -c %y /var/lib/holdfast/pool/images/` + shown + `/image)
				while test "$(stat -c %y /var/lib/holdfast/pool/images/` + shown + `/image)" = "$last"; do kill -0 $(cat /tmp/writer.pid); done
			done`)
	}
	m.sh("kill -INT $(cat /tmp/writer.pid)")
	m.until("the client's end", func() bool { _, err := m.try("kill -0 $(cat /tmp/writer.pid)"); return err != nil })
	if log := m.sh("cat /tmp/writer.log"); strings.Contains(log, "error") || !strings.Contains(log, "err= 0") {
		t.Errorf("the client of the worker says:\n%s", log)
	}
	if got := m.sh("holdfast volume get data -o json"); !strings.Contains(got, `"attachedTo": "sandbox:box"`) {
		t.Errorf("at the end the volume is %s", got)
	}
}

// sandbox is a container with nothing but namespaces.
const sandbox = `{"ociVersion": "1.0.2", "hostname": "sandbox", "root": {"path": "rootfs"},
 "process": {"args": ["/bin/sleep", "100000"], "cwd": "/", "env": ["PATH=/bin"], "noNewPrivileges": true, "user": {"uid": 0, "gid": 0}},
 "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
 "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]}}`

// machine is a systemd in namespaces of its own.
type machine struct {
	t    *testing.T
	dir  string
	init int // systemd, as this host numbers it
	log  *tail
}

// systemd is where distributions have it.
const systemd = "/lib/systemd/systemd"

// requireSystemd fails when there is none, unless it is waived by name.
func requireSystemd(t *testing.T) (cgroups string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv(blockdevtest.SkipVariable), ","), "systemd") {
		t.Skipf("needs systemd, waived by %s", blockdevtest.SkipVariable)
	}
	if _, err := os.Stat(systemd); err != nil {
		t.Fatalf("needs systemd: %v (waive with %s=systemd)", err, blockdevtest.SkipVariable)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	t.Fatalf("needs systemd: no cgroup2 is mounted (waive with %s=systemd)", blockdevtest.SkipVariable)
	return ""
}

func bootSystemd(t *testing.T) *machine {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.XFS, blockdevtest.Runc)
	cgroups := requireSystemd(t)
	m := &machine{t: t, dir: t.TempDir(), log: &tail{}}
	m.install()
	group, err := os.MkdirTemp(cgroups, "holdfast-test-")
	must(t, err)
	t.Cleanup(func() { removeGroup(t, group) })
	at, err := os.Open(group)
	must(t, err)
	defer at.Close()

	boot, err := filepath.Abs("testdata/systemd/boot.sh")
	must(t, err)
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "--kill-child", "--propagation", "private",
		"sh", boot, m.dir, systemd)
	cmd.Stdout, cmd.Stderr = m.log, m.log
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(at.Fd()), Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	t.Cleanup(func() {
		m.takeDown()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if out, err := exec.Command("losetup", "-j", filepath.Join(m.dir, "state", "pool.img")).Output(); err != nil || len(out) > 0 {
			t.Errorf("left behind: %s %v", out, err)
		}
	})
	m.until("boot", func() bool {
		m.init = onlyChild(cmd.Process.Pid)
		return m.init != 0 && exec.Command("nsenter", m.args("systemctl", "is-active", "--quiet", "holdfastd")...).Run() == nil
	})
	return m
}

// install lays out the unit as an operator would, between the targets that it
// names. Only the watchdog's times are shorter.
func (m *machine) install() {
	m.t.Helper()
	units, bin := filepath.Join(m.dir, "units"), filepath.Join(m.dir, "bin")
	for _, d := range []string{units, bin, filepath.Join(m.dir, "state"), filepath.Join(units, "holdfastd.service.d")} {
		must(m.t, os.MkdirAll(d, 0o755))
	}
	for from, to := range map[string]string{
		"../../deploy/holdfastd.service": filepath.Join(units, "holdfastd.service"),
		holdfastd:                        filepath.Join(bin, "holdfastd"),
		holdfast:                         filepath.Join(bin, "holdfast"),
		buildWorker(m.t):                 filepath.Join(bin, "holdfast-blockd"),
	} {
		b, err := os.ReadFile(from)
		must(m.t, err)
		must(m.t, os.WriteFile(to, b, 0o755))
	}
	for name, text := range map[string]string{
		"holdfastd.toml":                      "pool_size = \"512MiB\"\npool_mode = \"image\"\nlisten = \"none\"\n",
		"units/holdfastd.service.d/test.conf": "[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\nStandardError=append:/run/holdfastd.log\n",
		"units/test.target":                   "[Unit]\nDefaultDependencies=no\nRequires=holdfastd.service\n",
	} {
		must(m.t, os.WriteFile(filepath.Join(m.dir, name), []byte(text), 0o644))
	}
	for _, target := range []string{"sysinit", "basic", "shutdown", "local-fs", "network-online", "multi-user"} {
		must(m.t, os.WriteFile(filepath.Join(units, target+".target"), []byte("[Unit]\nDefaultDependencies=no\n"), 0o644))
	}
}

func (m *machine) args(args ...string) []string {
	return append([]string{"--target", strconv.Itoa(m.init), "--all", "--"}, args...)
}

// sh runs a script inside; each command must succeed.
func (m *machine) sh(script string, stdin ...string) string {
	m.t.Helper()
	out, err := m.try(script, stdin...)
	if err != nil {
		said, _ := m.try("tail -n 50 /run/holdfastd.log")
		m.t.Fatalf("%s: %v\n%s\nsystemd's log:\n%s\nthe daemon's:\n%s", script, err, out, m.log, said)
	}
	return strings.TrimSpace(out)
}

func (m *machine) try(script string, stdin ...string) (string, error) {
	cmd := exec.Command("nsenter", m.args("sh", "-euc", script)...)
	cmd.Stdin = strings.NewReader(strings.Join(stdin, ""))
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = patience // for what it left running with its output
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, errOut.String())
	}
	return out.String(), nil
}

func (m *machine) show(property string) string {
	m.t.Helper()
	return m.sh("systemctl show holdfastd --value -p " + property)
}

// snapshot is everything that a restart must not touch: mounts with their ids,
// devices, the container and its process, the worker's process and where it is counted.
func (m *machine) snapshot() string {
	m.t.Helper()
	return m.sh(`cut -d' ' -f1-6 /proc/1/mountinfo; runc list
		for f in /var/lib/holdfast/pool.img /var/lib/holdfast/pool/images/*/image; do losetup -n -O NAME,BACK-INO,DIO -j $f; done
		cut -d' ' -f1-6 /proc/$(runc state box | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')/mountinfo
		worker=$(dirname $(grep -lx holdfast-blockd /proc/[0-9]*/comm))
		echo $worker; cat $worker/cgroup`)
}

func (m *machine) until(what string, done func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			out, err := m.try("systemctl show holdfastd -p ActiveState,SubState,MainPID,NRestarts,Result,WatchdogTimestamp,WatchdogUSec; cat /proc/$(systemctl show holdfastd -p MainPID --value)/status")
			m.t.Fatalf("%s: not in time\n%s%v\n%s", what, out, err, m.log)
		}
	}
}

func (m *machine) takeDown() {
	if m.init == 0 {
		return
	}
	out, err := m.try(`systemctl kill -s CONT holdfastd || true
		systemctl start holdfastd
		kill $(cat /tmp/writer.pid) || true
		runc delete -f box || true
		for volume in data shown; do
			for id in $(holdfast attachment list $volume | sed -n 's/^\(att-[^ ]*\).*/\1/p'); do holdfast attachment delete $volume $id --force || true; done
		done
		systemctl stop holdfastd
		holdfastd uninstall --yes`)
	if err != nil {
		m.t.Errorf("take down: %v\n%s\n%s", err, out, m.log)
	}
}

// onlyChild is the one child of a process, 0 while there is none.
func onlyChild(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return child
}

// removeGroup removes a control group and those below it, once the kernel has
// let their last processes go.
func removeGroup(t *testing.T, group string) {
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		var groups []string
		_ = filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				groups = append(groups, path)
			}
			return nil
		})
		slices.Reverse(groups) // children before parents
		for _, g := range groups {
			err = syscall.Rmdir(g)
		}
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
	t.Errorf("control group %s: %v", group, err)
}

package lvm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/run"
	"holdfast/internal/vmtest"
)

// TestMarks: what has one of our marks but not the other, or both in another pool, is
// an operator's. It is not shown, and whatever we do it is still there.
func TestMarks(t *testing.T) {
	p := sharedPlace(t)
	pool := p.open(t)
	ours := published(t, pool, 1<<20)
	if err := writeImage(t, pool, ours, "ours"); err != nil {
		t.Fatal(err)
	}
	named, tagged, elsewhere := blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume)
	tags := " --addtag " + markTag + " --addtag " + pool.tag() + " "
	theirs := []string{imagePrefix + string(named), "data", trashPrefix + "keep", trashPrefix + string(tagged), imagePrefix + "vol-short", imagePrefix + string(elsewhere), "snap"}
	t.Cleanup(func() { sh(t, "lvremove -qq -ff -y vg/theirs") })
	sh(t, "set -e; lvcreate -qq -y -L 8m -T vg/theirs; "+
		"lvcreate -qq -y -an -V 1m -T "+p.name+" -n "+theirs[0]+"; "+
		"for n in "+strings.Join(theirs[1:5], " ")+"; do lvcreate -qq -y -an -V 1m -T "+p.name+tags+"-n $n; done; "+
		"lvcreate -qq -y -an -V 1m -T vg/theirs"+tags+"-n "+theirs[5]+"; "+
		"lvcreate -qq -y -an -ky -s -n "+theirs[6]+" "+pool.lv(imagePrefix+string(ours)))
	check := func() {
		t.Helper()
		infos, err := pool.List(t.Context())
		if err != nil || len(infos) > 1 || len(infos) == 1 && infos[0].ID != ours {
			t.Errorf("listed %+v, %v", infos, err)
		}
		if found, err := pool.Quarantined(t.Context()); err != nil || len(found) != 0 {
			t.Errorf("quarantined %+v, %v", found, err)
		}
	}
	check()
	for _, id := range []blockdev.ID{named, tagged, elsewhere} {
		if err := pool.Remove(t.Context(), id); err != nil {
			t.Errorf("remove of what we do not have: %v", err)
		}
		if _, err := pool.Open(t.Context(), id, anyBlock); !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("open of what we do not have: %v", err)
		}
	}
	// Its name is taken, and that is an error and no draft.
	if err := pool.Create(t.Context(), named, 1<<20); !errors.Is(err, blockdev.ErrExists) {
		t.Errorf("create by the name of an operator's volume: %v", err)
	}
	check()
	if err := pool.Remove(t.Context(), ours); err != nil {
		t.Error(err)
	}
	waitFor(t, "reclaimed space", func() bool { n, err := pool.Reclaiming(t.Context()); return err == nil && n == 0 })
	pool = p.open(t)
	check()
	left := sh(t, "lvs --noheadings -o lv_name vg")
	for _, name := range theirs {
		if !strings.Contains(left, name) {
			t.Errorf("%s, which was an operator's, is gone: %s", name, left)
		}
	}
	// A snapshot that an operator made outlives what it was made of.
	if got := sh(t, "lvchange -qq -ay -K vg/snap; head -c 4 /dev/vg/snap; lvchange -qq -an vg/snap"); got != "ours" {
		t.Errorf("the operator's snapshot holds %q", got)
	}
	sh(t, "lvremove -qq -ff -y vg/data vg/snap vg/"+strings.Join(theirs[:1], "")+" vg/"+strings.Join(theirs[2:5], " vg/"))
}

// TestOtherGroups: our commands see the devices of our group and no others; groups
// that are exported or another host's are refused with what to do.
func TestOtherGroups(t *testing.T) {
	pool := sharedPlace(t).open(t)
	disk := vmtest.Disks()[1]
	t.Cleanup(func() { sh(t, "wipefs -qa "+disk) })
	sh(t, "vgcreate -qq -s 1m other "+disk+"; lvcreate -qq -y -L 8m -T other/pool")
	text, err := pool.ask(t.Context(), "lvs", "--noheadings", "-o", "vg_name")
	if err != nil || strings.Contains(string(text), "other") || !strings.Contains(string(text), "vg") {
		t.Errorf("our commands see %q, %v", text, err)
	}
	text, err = pool.ask(t.Context(), "pvs", "--noheadings", "-o", "pv_name")
	if err != nil || strings.TrimSpace(string(text)) != vmtest.Disks()[0] {
		t.Errorf("our commands see %q, %v", text, err)
	}
	refused := func(says string) {
		t.Helper()
		if _, err := Open(t.Context(), "other/pool", Options{}); !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want something of %q", err, says)
		}
	}
	sh(t, "vgchange -qq -an other; lvm vgexport -qq other")
	refused("vgimport")
	sh(t, "wipefs -qa "+disk+"; vgcreate -qq -s 1m --systemid elsewhere other "+disk+" 2>/dev/null")
	refused("elsewhere")
}

// TestNonsenseFromLVM puts a program in LVM's place that has its words on the way.
func TestNonsenseFromLVM(t *testing.T) {
	p := sharedPlace(t)
	pool := p.open(t)
	id := published(t, pool, 1<<20)
	real, err := run.Look("lvm")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for _, c := range []struct {
		name, script, says string
		want               error
	}{
		{"warnings", `echo "  WARNING: something is odd" >&2; exec ` + real + ` "$@"`, "", nil},
		{"a cut report", real + ` "$@" | head -c 60`, "makes no sense", errNonsense},
		{"no report", `echo "  Reloading the universe"`, "makes no sense", errNonsense},
		{"nothing", `exit 0`, "makes no sense", errNonsense},
		{"an unknown error", `echo "  Internal error: odd" >&2; exit 5`, "Internal error: odd", nil},
		{"death", `kill -9 $$`, "signal: killed", nil},
		{"no group", `echo '  Volume group "vg" not found' >&2; exit 5`, "not there", blockdev.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(dir, "lvm"), []byte("#!/bin/sh\n"+c.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			pool, err := p.tryOpen(t)
			if c.says == "" {
				if err != nil {
					t.Fatal(err)
				}
				if i, err := pool.Stat(t.Context(), id); err != nil || i.ID != id {
					t.Errorf("%+v, %v", i, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.says) || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%v, want %v with %q", err, c.want, c.says)
			}
		})
	}
	if err := os.Remove(filepath.Join(dir, "lvm")); err != nil {
		t.Fatal(err)
	}
	if i, err := p.open(t).Stat(t.Context(), id); err != nil || i.Draft || i.Size != 1<<20 {
		t.Errorf("after all of that: %+v, %v", i, err)
	}
	tools = append(tools, "no-such-program")
	defer func() { tools = tools[:len(tools)-1] }()
	if _, err := p.tryOpen(t); !errors.Is(err, blockdev.ErrInvalid) || !errors.Is(err, run.ErrNotFound) || !strings.Contains(err.Error(), "thin-provisioning-tools") {
		t.Errorf("without a tool: %v", err)
	}
}

// TestZeroingTurnedOff: a pool that stops zeroing new blocks gets no more images; one
// that keeps what is discarded is warned of.
func TestZeroingTurnedOff(t *testing.T) {
	p := newPlace(t, "24m --discards ignore")
	pool := p.open(t)
	id := published(t, pool, 1<<20)
	sh(t, "lvchange -qq -y --zero n "+p.name)
	for what, err := range map[string]error{
		"create": pool.Create(t.Context(), blockdevtest.NewID(blockdev.PrefixVolume), 1<<20),
		"clone":  pool.Clone(t.Context(), blockdevtest.NewID(blockdev.PrefixVolume), id, 1<<20),
	} {
		if !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "--zero y") {
			t.Errorf("%s in a pool that does not zero: %v", what, err)
		}
	}
	if _, err := p.tryOpen(t); !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "--zero y") {
		t.Errorf("open: %v", err)
	}
	sh(t, "lvchange -qq -y --zero y "+p.name)
	if s, err := pool.status(); err != nil || !s.keeps {
		t.Errorf("%+v, %v", s, err)
	}
	if err := p.open(t).Create(t.Context(), blockdevtest.NewID(blockdev.PrefixVolume), 1<<20); err != nil {
		t.Error(err)
	}
}

// TestGroups: what LVM says of a group is read, and believed only when it makes sense.
func TestGroups(t *testing.T) {
	const row = `{"report": [{"pv": [{"pv_name":"%s", "vg_name":"vg", "vg_extent_size":"%s", "vg_attr":"%s", "vg_systemid":"", "of_later":"1"}]}], "log": []}`
	for _, c := range []struct {
		name, extent, attr, says string
		want                     error
	}{
		{"/dev/sda", "1048576", "wz--n-", "", nil},
		{"/dev/sda", "1048576", "", "", nil},
		{"[unknown]", "1048576", "wz-pn-", "missing", errNoGroup},
		{"/dev/sda", "1048576", "wz-pn-", "missing", errNoGroup},
		{"/dev/sda", "1048576", "wzx-n-", "vgimport", errNoGroup},
		{"/dev/sda", "1048576", "rz--n-", "read-only", errNoGroup},
		{"/dev/sda", "1m", "wz--n-", "makes no sense", errNonsense},
		{"/dev/sda", "0", "wz--n-", "makes no sense", errNonsense},
		{"sda", "1048576", "wz--n-", "makes no sense", errNonsense},
	} {
		rows, err := parsePVs(fmt.Appendf(nil, row, c.name, c.extent, c.attr))
		if err != nil {
			t.Fatal(err)
		}
		devices, extent, err := readPVs("vg", rows)
		if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.says) || err == nil && (len(devices) != 1 || extent != 1<<20) {
			t.Errorf("%+v: %v, %d, %v", c, devices, extent, err)
		}
	}
	for _, bad := range []string{"", "{}", "x", `{"report":[{"pv":[{]}`, `{"report":[{},{}]}`} {
		if rows, err := parsePVs([]byte(bad)); !errors.Is(err, errNonsense) {
			t.Errorf("%q is %+v, %v", bad, rows, err)
		}
	}
}

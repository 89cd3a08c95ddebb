package lvm

import (
	"errors"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// TestUnfitPools: what images would not be safe in is refused, with what to do.
func TestUnfitPools(t *testing.T) {
	group(t)
	sh(t, "lvcreate -qq -y -Zn -Wn -L 8m -n plain vg; lvcreate -qq -y -L 16m --zero n -T vg/dirty")
	t.Cleanup(func() { sh(t, "lvremove -qq -ff -y vg/plain vg/dirty") })
	for name, says := range map[string]string{
		"vg": "group/pool", "vg/plain": "no thin pool", "vg/dirty": "lvchange --zero y", "vg/missing": "no missing", "nogroup/pool": "no device belongs",
		"../vg/pool": "group/pool", "vg/-n": "group/pool", "vg/a b": "group/pool",
	} {
		_, err := Open(t.Context(), name, Options{MetaBytes: leastMeta})
		if !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want something of %q", name, err, says)
		}
	}
}

// TestOthersVolumes: an operator's volumes are not ours, whatever they are called,
// and a second process is kept out.
func TestOthersVolumes(t *testing.T) {
	p := sharedPlace(t)
	pool := p.open(t)
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	foreign := imagePrefix + string(id)
	sh(t, "lvcreate -qq -y -Wn -V 4m -T "+p.name+" -n "+foreign)
	if infos, err := pool.List(t.Context()); err != nil || len(infos) != 0 {
		t.Errorf("listed %v, %v", infos, err)
	}
	if _, err := pool.Stat(t.Context(), id); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("stat of an operator's volume: %v", err)
	}
	if found, err := pool.Quarantined(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("quarantined %v, %v", found, err)
	}
	if _, err := Open(t.Context(), p.name, Options{}); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("opened twice: %v", err)
	}
	if again := p.open(t); again.Identity() != pool.Identity() || again.Identity().UUID == "" {
		t.Errorf("identity %+v became %+v", pool.Identity(), again.Identity())
	}
	sh(t, "lvs vg/"+foreign)
}

// TestStatus: what the kernel says of a pool is read right, and named.
func TestStatus(t *testing.T) {
	p := &Pool{group: "vg", thin: "pool", chunk: 64 << 10}
	for _, c := range []struct {
		line  string
		want  status
		state blockdev.PoolState
		says  string
	}{
		{"1 62/512 1/16384 - rw discard_passdown queue_if_no_space - 128", status{mode: "rw", data: use{1, 16384}, meta: use{62, 512}}, blockdev.PoolHealthy, ""},
		{"1 62/512 99/100 - rw discard_passdown queue_if_no_space - 128", status{mode: "rw", data: use{99, 100}, meta: use{62, 512}}, blockdev.PoolLow, "lvextend -L"},
		{"1 500/512 1/100 - rw discard_passdown queue_if_no_space - 128", status{mode: "rw", data: use{1, 100}, meta: use{500, 512}}, blockdev.PoolLow, "--poolmetadatasize"},
		{"0 9/512 5/5 - out_of_data_space discard_passdown error_if_no_space - 128", status{mode: "out_of_data_space", errorsOnFull: true, data: use{5, 5}, meta: use{9, 512}}, blockdev.PoolFull, "fail"},
		{"0 9/512 5/5 - rw discard_passdown queue_if_no_space - 128", status{mode: "rw", data: use{5, 5}, meta: use{9, 512}}, blockdev.PoolFull, "wait"},
		{"0 9/512 5/9 3 ro no_discard_passdown queue_if_no_space needs_check 128", status{mode: "ro", needsCheck: true, data: use{5, 9}, meta: use{9, 512}}, blockdev.PoolNeedsRepair, "lvchange -ay"},
		{"0 510/512 5/9 3 ro no_discard_passdown queue_if_no_space - 128", status{mode: "ro", data: use{5, 9}, meta: use{510, 512}}, blockdev.PoolNeedsRepair, "--poolmetadatasize"},
		{"Fail", status{mode: "Fail"}, blockdev.PoolFailed, "lvconvert --repair"},
		{"Error", status{mode: "Error"}, blockdev.PoolFailed, "dmesg"},
	} {
		got, err := parseStatus(c.line)
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v", c.line, got, err)
		}
		if h := p.diagnose(got); h.State != c.state || !strings.Contains(h.Reason, c.says) || (h.Reason == "") != (c.says == "") {
			t.Errorf("%s means %+v", c.line, h)
		}
	}
	for _, bad := range []string{"", "x", "1 2 3 4 5 6 7 8", "1 62/512 ?/16384 - rw discard_passdown queue_if_no_space - 128", "1 62/512 1/2 - odd discard_passdown queue_if_no_space - 128"} {
		if got, err := parseStatus(bad); !errors.Is(err, errNonsense) {
			t.Errorf("%q is %+v, %v", bad, got, err)
		}
	}
}

// TestRoom: metadata bounds what can be promised as data does.
func TestRoom(t *testing.T) {
	for _, c := range []struct {
		s    status
		want int64
	}{
		{status{data: use{10, 100}, meta: use{10, 512}}, 90},
		{status{data: use{10, 1 << 30}, meta: use{412, 512}}, 100 * metaBlock / mappingBytes},
		{status{data: use{100, 100}, meta: use{10, 512}}, 0},
		{status{data: use{10, 100}, meta: use{512, 512}}, 0},
	} {
		if got := c.s.room(); got != c.want {
			t.Errorf("%+v has room for %d chunks, want %d", c.s, got, c.want)
		}
	}
}

// TestNonsense: what tools say that makes no sense is an error, never half believed.
func TestNonsense(t *testing.T) {
	for _, bad := range []string{"", "{}", "not json", `{"report":[]}`, `{"report":[{"lv":[{"lv_name":"x","lv_si`, `{"report":[{"lv":[{"lv_name":"x"}]}]}`, `{"report":[{"lv":[{"lv_size":"1"}]}]}`, `{"report":[{"lv":[{"lv_name":"x","lv_size":"1m"}]}]}`} {
		if rows, err := parseRows([]byte(bad)); !errors.Is(err, errNonsense) {
			t.Errorf("%q gave %v, %v", bad, rows, err)
		}
	}
	if rows, err := parseRows([]byte(`{"report":[{"lv":[{"lv_name":"x","lv_size":"512","of_later":"y"}],"of_later":[]}],"log":[]}`)); err != nil || len(rows) != 1 || rows[0].Name != "x" {
		t.Errorf("a report with more in it: %+v, %v", rows, err)
	}
	if used, err := parseUsed([]byte("  1 65536 0\n\n 2 131072 65536\n")); err != nil || used["1"] != (space{65536, 0}) || used["2"] != (space{131072, 65536}) {
		t.Errorf("%v, %v", used, err)
	}
	for _, bad := range []string{"1 2", "1 x 3", "1 2 3 4"} {
		if used, err := parseUsed([]byte(bad)); err == nil {
			t.Errorf("%q gave %v", bad, used)
		}
	}
	head := make([]byte, deviceHead)
	if _, err := metadataAreas(head); !errors.Is(err, errNoLabel) {
		t.Errorf("zeroes: %v", err)
	}
	copy(head[sector:], labelMagic)
	for _, offset := range []byte{0, 31, 255} {
		head[sector+20], head[sector+21] = offset, offset
		if _, err := metadataAreas(head); !errors.Is(err, errNoLabel) {
			t.Errorf("a header at %d: %v", offset, err)
		}
	}
	if p := (&Pool{devices: []string{"/dev/null"}}); p.state().stamp != "" {
		t.Error("what is no physical volume has a stamp")
	}
}

// TestChangesByOthers: what an operator does to the group is seen at once.
func TestChangesByOthers(t *testing.T) {
	p := sharedPlace(t)
	pool := p.open(t)
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(pool.Create(t.Context(), id, 4<<20), pool.Publish(t.Context(), id, []byte("x"))); err != nil {
		t.Fatal(err)
	}
	if info, err := pool.Stat(t.Context(), id); err != nil || info.Size != 4<<20 {
		t.Fatalf("%+v, %v", info, err)
	}
	before := pool.state().stamp
	if before == "" || before != pool.state().stamp {
		t.Error("the stamp of what does not change is not one")
	}
	sh(t, "lvextend -qq -L 9m vg/"+imagePrefix+string(id))
	if info, err := pool.Stat(t.Context(), id); err != nil || info.Size != 9<<20 || pool.state().stamp == before {
		t.Errorf("after an operator's lvextend: %+v, %v", info, err)
	}
}

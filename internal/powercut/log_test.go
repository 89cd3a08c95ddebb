package powercut

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

// logOf makes a log: a superblock, then entries with sector, count and flags,
// each followed by its data.
type logOf struct{ bytes.Buffer }

func newLog() *logOf {
	l := &logOf{}
	var b [sector]byte
	binary.LittleEndian.PutUint64(b[0:], logMagic)
	binary.LittleEndian.PutUint64(b[8:], logVersion)
	binary.LittleEndian.PutUint32(b[24:], sector)
	l.Write(b[:])
	return l
}

func (l *logOf) add(first, count, flags uint64, fill byte) *logOf {
	var b [sector]byte
	binary.LittleEndian.PutUint64(b[0:], first)
	binary.LittleEndian.PutUint64(b[8:], count)
	binary.LittleEndian.PutUint64(b[16:], flags)
	l.Write(b[:])
	if flags&flagDiscard == 0 {
		l.Write(bytes.Repeat([]byte{fill}, int(count)*sector))
	}
	return l
}

func (l *logOf) read(disk int64) ([]entry, error) {
	return readLog(bytes.NewReader(l.Bytes()), int64(l.Len()), disk)
}

type memory []byte

func (m memory) WriteAt(b []byte, off int64) (int, error) { return copy(m[off:], b), nil }
func (m memory) Zero(off, length int64) error             { clear(m[off : off+length]); return nil }

const memorySize = 16 * sector

// firsts replays and gives the first byte of each sector.
func firsts(t *testing.T, l *logOf, entries []entry, dropped func(int) bool) []byte {
	t.Helper()
	m := memory(bytes.Repeat([]byte{'.'}, memorySize))
	if err := replay(m, bytes.NewReader(l.Bytes()), entries, dropped); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for i := 0; i < len(m); i += sector {
		got = append(got, m[i])
	}
	return got
}

func TestReplayInOrder(t *testing.T) {
	l := newLog().add(0, 4, 0, 'a').add(2, 4, 0, 'b').add(0, 0, flagFlush, 0).add(3, 2, flagDiscard, 0).add(15, 1, flagFUA, 'c')
	entries, err := l.read(memorySize)
	if err != nil {
		t.Fatal(err)
	}
	for n, want := range map[int]string{
		0: "................",
		1: "aaaa............",
		2: "aabbbb..........",
		3: "aabbbb..........",
		4: "aab\x00\x00b..........",
		5: "aab\x00\x00b.........c",
	} {
		if got := firsts(t, l, entries[:n], dropper(0)); string(got) != want {
			t.Errorf("first %d entries give %q, want %q", n, got, want)
		}
	}
	if n := settled(entries, 5); n != 3 {
		t.Errorf("settled are %d entries, want the 3 up to the flush", n)
	}
	if n := settled(entries, 2); n != 0 {
		t.Errorf("settled before any flush are %d entries", n)
	}
	for i, e := range entries {
		if n := before(entries, Moment(e.end())); n != i+1 {
			t.Errorf("before the end of entry %d are %d", i, n)
		}
		if n := before(entries, Moment(e.at)); n != i {
			t.Errorf("before the begin of entry %d are %d", i, n)
		}
	}
}

func TestDropperIsASubset(t *testing.T) {
	seen := map[string]bool{}
	for seed := uint64(1); seed < 40; seed++ {
		var one, two []byte
		for i := range 16 {
			one = append(one, "kd"[map[bool]int{true: 1}[dropper(seed)(i)]])
			two = append(two, "kd"[map[bool]int{true: 1}[dropper(seed)(i)]])
		}
		if !slices.Equal(one, two) {
			t.Fatalf("seed %d drops %s, then %s", seed, one, two)
		}
		seen[string(one)] = true
	}
	if len(seen) < 30 {
		t.Errorf("39 seeds gave %d different subsets", len(seen))
	}
}

func TestDamagedLogsAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		log  *logOf
		want string
	}{
		"never written":   {newLog().add(0, 0, 0, 0).add(0, 1, 0, 'a'), "never written"},
		"unknown flag":    {newLog().add(0, 1, 1<<5, 'a'), "unknown flags"},
		"mark":            {newLog().add(0, 1, flagMark, 'a'), "mark"},
		"beyond the disk": {newLog().add(15, 2, 0, 'a'), "on a disk of 16"},
		"overflow":        {newLog().add(1<<63, 1<<63, flagDiscard, 0), "on a disk of 16"},
		"foreign": {func() *logOf {
			l := newLog().add(0, 1, 0, 'a')
			l.Bytes()[0]++
			return l
		}(), "not a log"},
		"cut short": {func() *logOf {
			l := newLog().add(0, 2, 0, 'a')
			l.Truncate(l.Len() - sector)
			return l
		}(), "the last entry ends"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := c.log.read(memorySize); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
	if entries, err := readLog(bytes.NewReader(nil), 0, memorySize); err != nil || len(entries) != 0 {
		t.Errorf("an empty log gives %v, %v", entries, err)
	}
}

package powercut

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
)

// addMark makes an entry as dm-log-writes does for a message "mark TEXT".
func (l *logOf) addMark(text string) *logOf {
	var b [sector]byte
	binary.LittleEndian.PutUint64(b[16:], flagMark)
	binary.LittleEndian.PutUint64(b[24:], uint64(len(text)+1))
	copy(b[markAt:], text)
	l.Write(b[:])
	return l
}

func (l *logOf) kernel(t *testing.T, entries uint64) (*KernelLog, error) {
	t.Helper()
	binary.LittleEndian.PutUint64(l.Bytes()[16:], entries)
	return ReadKernelLog(bytes.NewReader(l.Bytes()), memorySize)
}

func TestKernelLog(t *testing.T) {
	l, err := newLog().add(0, 1, flagMeta, 'a').addMark("one").add(0, 0, flagFlush, 0).add(1, 1, flagFUA, 'b').add(0, 1, flagDiscard, 0).addMark("two").add(0, 16, 0, 'x').kernel(t, 6)
	if err != nil {
		t.Fatal(err)
	}
	if l.Len() != 6 || l.Mark("one") != 1 || l.Mark("two") != 5 || l.Mark("three") != -1 || !slices.Equal(l.Flushes(0, 6), []int{3, 4}) {
		t.Errorf("%d entries, marks %d, %d, %d, flushes %v", l.Len(), l.Mark("one"), l.Mark("two"), l.Mark("three"), l.Flushes(0, 6))
	}
	for n, want := range map[int]string{1: "a\x00", 4: "ab", 6: "\x00b"} {
		m := make(memory, memorySize)
		if err := l.Replay(m, n); err != nil || string([]byte{m[0], m[sector]}) != want {
			t.Errorf("after %d entries %q, %v, want %q", n, []byte{m[0], m[sector]}, err, want)
		}
	}
	for name, bad := range map[string]*logOf{"no log": {}, "more entries than there are": newLog().add(0, 1, 0, 'a'), "an endless mark": func() *logOf {
		l := newLog().addMark("x")
		binary.LittleEndian.PutUint64(l.Bytes()[sector+24:], 1<<40)
		return l
	}()} {
		if bad.Len() == 0 {
			bad.Write(make([]byte, sector))
		}
		if _, err := bad.kernel(t, 2); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}

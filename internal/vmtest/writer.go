package vmtest

import (
	"fmt"
	"testing"
)

// Writer is fio in a guest, round after round: each writes a part of a file in random
// order past the page cache, flushes now and then, and reads again what it has written.
// A guest has one at a time.
type Writer struct{ v *VM }

// Write starts one in a directory of the guest, and returns when a round has ended.
func (v *VM) Write(t testing.TB, dir string) *Writer {
	t.Helper()
	v.Sh(t, "rm -f /tmp/rounds /tmp/failed /tmp/enough /tmp/over; (i=0; while [ ! -e /tmp/enough ]; do "+
		"fio --name=w --filename="+dir+"/fio --size=1m --bs=4k --rw=randwrite --ioengine=libaio --iodepth=8 --direct=1 --fsync=32 --randseed=$i "+
		"--verify=crc32c --verify_fatal=1 --error_dump=0 >/tmp/fio.out 2>&1 || { cp /tmp/fio.out /tmp/failed; break; }; "+
		"i=$((i+1)); echo $i > /tmp/rounds.new; mv /tmp/rounds.new /tmp/rounds; done; touch /tmp/over) >/dev/null 2>&1 &")
	w := &Writer{v}
	w.next(t, "0")
	return w
}

// next waits for a round that began after a number of them had ended.
func (w *Writer) next(t testing.TB, after string) {
	t.Helper()
	w.v.Sh(t, "while [ $(cat /tmp/rounds 2>/dev/null || echo 0) -lt $(("+after+" + 1)) ] && [ ! -e /tmp/failed ]; do sleep 0.05; done; [ ! -e /tmp/failed ] || { cat /tmp/failed; exit 1; }")
}

// Through does something while the guest writes, and waits until what it had begun
// before and what it began after has been read again.
func (w *Writer) Through(t testing.TB, do func()) {
	t.Helper()
	do()
	w.next(t, fmt.Sprintf("%s + 1", w.v.Sh(t, "cat /tmp/rounds 2>/dev/null || echo 0")))
}

// Enough ends it, and fails the test for a request that failed or a byte that was lost.
func (w *Writer) Enough(t testing.TB) {
	t.Helper()
	w.v.Sh(t, "touch /tmp/enough; while [ ! -e /tmp/over ]; do sleep 0.02; done; rm /tmp/over; [ ! -e /tmp/failed ] || { cat /tmp/failed; exit 1; }")
	if log := w.v.Sh(t, "dmesg | grep -iE 'i/o error|blk_update|ext4-fs error' || true"); log != "" {
		t.Errorf("the guest saw %s", log)
	}
}

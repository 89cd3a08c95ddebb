package loop

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"holdfast/blockdev"
)

// statSector is the unit of /sys/block/*/stat, whatever the device's own is.
const statSector = 512

// Counters tells what went through the device since the kernel made it: earlier
// uses of the same number are in it (Documentation/block/stat.rst). The caller
// subtracts what it read when it made the device.
func (d Device) Counters() (blockdev.Counters, error) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path) + "/stat")
	if err != nil {
		return blockdev.Counters{}, blockdev.Op("loop.Counters", "", err)
	}
	c, err := parseStat(string(text))
	return c, blockdev.Op("loop.Counters", "", err)
}

func parseStat(text string) (blockdev.Counters, error) {
	fields := strings.Fields(text)
	if len(fields) < 16 { // flushes are counted since Linux 5.5
		return blockdev.Counters{}, fmt.Errorf("block statistics with %d fields, want 16", len(fields))
	}
	number := func(i int) (n int64) {
		n, _ = strconv.ParseInt(fields[i], 10, 64) // digits, by the kernel
		return n
	}
	return blockdev.Counters{
		Reads: number(0), ReadBytes: number(2) * statSector,
		Writes: number(4), WriteBytes: number(6) * statSector,
		Discards: number(11), DiscardBytes: number(13) * statSector,
		Flushes: number(15), Inside: number(8),
	}, nil
}

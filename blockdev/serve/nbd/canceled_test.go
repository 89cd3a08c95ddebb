package nbd

import (
	"syscall"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// TestKernelWithoutThreads: what the kernel has no thread for is done all the same. A
// direct write to a hole and a flush need one.
func TestKernelWithoutThreads(t *testing.T) {
	blockdevtest.WithoutThreads(t, func(t *testing.T) {
		f := image(t, 64*mib, syscall.O_DIRECT)
		_, socket := serving(t, Options{}, export(t, "", f, ExportOptions{}))
		c := dial(t, socket).enter("")
		const length = 64 << 10
		for n := range uint64(16) {
			c.ok(cmdWrite, uint16(n%2)*flagFUA, n*mib, length, pattern(length, n))
		}
		c.ok(cmdFlush, 0, 0, 0, nil)
		for n := range uint64(16) {
			c.reads(n*mib, pattern(length, n))
		}
	})
}

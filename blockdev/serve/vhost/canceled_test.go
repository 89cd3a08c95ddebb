package vhost_test

import (
	"os"
	"syscall"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/vhost"
	"holdfast/blockdev/serve/vhost/frontend"
)

// TestKernelWithoutThreads: what the kernel has no thread for is done all the same.
// Flushes, discards and zeroes need one, and so does a direct write to a hole.
func TestKernelWithoutThreads(t *testing.T) {
	blockdevtest.WithoutThreads(t, func(t *testing.T) {
		image := newImage(t)
		if err := os.Truncate(image, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, imageSize); err != nil {
			t.Fatal(err)
		}
		const depth = 8
		_, socket := served(t, image, os.O_RDWR|syscall.O_DIRECT, vhost.Options{})
		f := connected(t, socket, frontend.Options{Depth: depth, Buffer: 4 * block})
		newModel(t, depth).load(f.Queues[0], 400, nil)
	})
}

package guest

import (
	"fmt"
	"io"
)

// cpioWriter writes an initramfs: the "newc" format of
// Documentation/driver-api/early-userspace/buffer-format.rst. Owners, times and
// inode numbers are fixed, so that equal contents give equal bytes.
type cpioWriter struct {
	w     io.Writer
	inode int
	err   error
}

const (
	cpioFile = 0o100000
	cpioDir  = 0o040000
	cpioNode = 0o020000 // a character device
)

func (c *cpioWriter) add(name string, mode int, data []byte) { c.entry(name, mode, 0, 0, data) }

func (c *cpioWriter) entry(name string, mode, major, minor int, data []byte) {
	if c.err != nil {
		return
	}
	c.inode++
	head := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", c.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	for _, part := range [][]byte{pad([]byte(head + name + "\x00")), pad(data)} {
		if _, err := c.w.Write(part); err != nil {
			c.err = err
			return
		}
	}
}

// close ends the archive.
func (c *cpioWriter) close() error {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	return c.err
}

// pad fills up to a multiple of four bytes.
func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

package qemu

import "strings"

// AIO is how QEMU does a volume's I/O: BlockdevAioOptions of its schema.
type AIO string

// The ways. Native and IOUring need nothing else of a volume: it is opened past the
// page cache.
const (
	Auto    AIO = "auto" // the best that QEMU and its host have
	IOUring AIO = "io_uring"
	Native  AIO = "native"
	Threads AIO = "threads"
)

// AIOs are all of them.
func AIOs() []string { return []string{string(Auto), string(IOUring), string(Native), string(Threads)} }

// ways are those to try, in order: Auto takes them as they were measured
// (docs/performance.md), and threads always work.
func (a AIO) ways() []AIO {
	if a == Auto || a == "" {
		return []AIO{IOUring, Native, Threads}
	}
	return []AIO{a}
}

// lacksAIO reports whether QEMU refused a node because it was built without that way
// of doing I/O: its schema does not have the word then, or its code says so.
func lacksAIO(err error, a AIO) bool {
	r := refused(err)
	return r != nil && (strings.Contains(r.Desc, "aio="+string(a)) || strings.Contains(r.Desc, "'"+string(a)+"'"))
}

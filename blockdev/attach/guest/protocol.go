package guest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

const (
	// Version is the protocol's. A side that does not know the other's says so.
	Version = 1
	// Port is the name of the virtio-serial port.
	Port = "io.holdfast.guest.0"
	// VsockPort is where an agent listens on vsock.
	VsockPort = 18502

	// LongestLine bounds a message, in bytes.
	LongestLine = 64 << 10
	// WorkingEvery is how often an agent says that it is still at a request.
	WorkingEvery = time.Second
)

// What an agent can be asked to do.
const (
	Hello   = "hello"   // which protocol and program it is
	List    = "list"    // which disks there are
	Mount   = "mount"   // a volume at Path
	Unmount = "unmount" // a volume, wherever it is mounted
	Grow    = "grow"    // the filesystem to its device, once that has Size
	Sync    = "sync"    // make durable what was written
	Trim    = "trim"    // discard free blocks of Length bytes from byte From on
	Freeze  = "freeze"  // hold all writes until thaw, for TimeoutMs at most
	Thaw    = "thaw"
	Stat    = "stat" // how full the filesystem is
)

// Request asks for one thing. Every request can be made again.
type Request struct {
	ID string `json:"id"`
	Do string `json:"do"`
	// Serial names the disk; of all but Hello and List.
	Serial     string `json:"serial,omitempty"`
	Path       string `json:"path,omitempty"`       // mount: absolute and clean
	Filesystem string `json:"filesystem,omitempty"` // mount: ext4, xfs or btrfs
	ReadOnly   bool   `json:"readOnly,omitempty"`   // mount
	Lazy       bool   `json:"lazy,omitempty"`       // unmount: flush, and take it away although it is in use
	Size       int64  `json:"size,omitempty"`       // grow: bytes that the device has by now
	From       int64  `json:"from,omitempty"`       // trim
	Length     int64  `json:"length,omitempty"`     // trim
	TimeoutMs  int64  `json:"timeoutMs,omitempty"`  // freeze; mount and grow: how long to wait for the device
}

// Answer is what an agent says to a request.
type Answer struct {
	ID      string   `json:"id"`
	Working bool     `json:"working,omitempty"` // it is at it; the answer follows
	Failure *Failure `json:"failure,omitempty"`

	Version int    `json:"version,omitempty"` // hello
	Program string `json:"program,omitempty"` // hello: its version, in words

	Disks  []Disk   `json:"disks,omitempty"`  // list
	Trim   *Trimmed `json:"trim,omitempty"`   // trim
	Usage  *Usage   `json:"usage,omitempty"`  // stat: of a mounted one
	Frozen bool     `json:"frozen,omitempty"` // stat
	Size   int64    `json:"size,omitempty"`   // grow: bytes of the filesystem
}

// The codes of failures.
const (
	CodeInvalid     = "invalid"     // the request
	CodeNotFound    = "not-found"   // there is no disk of that serial
	CodeNotMounted  = "not-mounted" // there is, and it is not mounted
	CodeBusy        = "busy"        // in use by Holders, or the place is taken; nothing has changed
	CodeUnsupported = "unsupported"
	CodeFailed      = "failed"
)

// Failure says why something was not done.
type Failure struct {
	Code    string   `json:"code"`
	Text    string   `json:"text,omitempty"`
	Holders []Holder `json:"holders,omitempty"`
}

// Holder is a process that has files of a volume open.
type Holder struct {
	Pid  int    `json:"pid"`
	Name string `json:"name,omitempty"`
}

// Disk is one that has a serial number.
type Disk struct {
	Serial   string  `json:"serial"`
	Name     string  `json:"name"` // "vdb"
	Size     int64   `json:"size"` // bytes
	ReadOnly bool    `json:"readOnly,omitempty"`
	Mounts   []Point `json:"mounts,omitempty"`
}

// Point is where a disk's filesystem is mounted.
type Point struct {
	Path       string `json:"path"`
	Filesystem string `json:"filesystem"`
	ReadOnly   bool   `json:"readOnly,omitempty"`
}

// Trimmed is how far a trim came, in bytes.
type Trimmed struct {
	Discarded int64 `json:"discarded"`
	Next      int64 `json:"next"`
	Done      bool  `json:"done"`
}

// Usage is how full a filesystem is: bytes, and inodes where it counts them.
type Usage struct {
	Total      int64 `json:"total"`
	Used       int64 `json:"used"`
	Free       int64 `json:"free"`
	Inodes     int64 `json:"inodes,omitempty"`
	UsedInodes int64 `json:"usedInodes,omitempty"`
	FreeInodes int64 `json:"freeInodes,omitempty"`
}

var errLong = errors.New("a line is too long")

// Line reads one message. errLong for one that is longer than LongestLine, after
// which the stream is still inside of it.
func Line(r *bufio.Reader) ([]byte, error) {
	var text []byte
	for {
		part, err := r.ReadSlice('\n')
		text = append(text, part...)
		switch {
		case len(text) > LongestLine:
			return nil, errLong
		case err == nil:
			return text, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// Requests calls take with each request that comes over a stream, until that ends. What
// is no request is passed over.
func Requests(stream io.Reader, take func(Request)) error {
	r := bufio.NewReaderSize(stream, 4096)
	for {
		text, err := Line(r)
		if errors.Is(err, errLong) {
			continue
		}
		if err != nil {
			return err
		}
		var request Request
		if json.Unmarshal(text, &request) == nil && request.ID != "" && len(request.ID) <= longestID {
			take(request)
		}
	}
}

// longestID bounds a request's number, in bytes.
const longestID = 64

// write sends a message in one call.
func write(w io.Writer, message any) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(text) >= LongestLine {
		return fmt.Errorf("a message of %d bytes", len(text))
	}
	_, err = w.Write(append(text, '\n'))
	return err
}

// WriteAnswer sends an answer.
func WriteAnswer(w io.Writer, a Answer) error { return write(w, a) }

// ValidSerial checks the name of a disk.
func ValidSerial(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return true
}

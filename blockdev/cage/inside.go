package cage

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	"holdfast/internal/run"
)

// order is a command for the process inside.
type order struct {
	Args    []string
	Timeout time.Duration
}

// reply is what became of it.
type reply struct {
	Code      int // -1: it did not start, or was killed
	Stdout    []byte
	Stderr    []byte
	Truncated bool
	Problem   string // why it failed; empty for an exit of its own
	Missing   bool   // there is no such program
}

const (
	// outputLimit is what is kept of stdout, and of stderr, in bytes.
	outputLimit = 64 << 10
	// replyLimit is what one reply can have at most, as JSON.
	replyLimit = 4*outputLimit + 16<<10
	// socketFD is the first descriptor after the standard ones.
	socketFD = 3
)

// greeting is sent when the process inside is ready.
const greeting = byte('\n')

// Inside is the first process of a cage: it carries out orders from the socket
// until that is closed, and gives the process's exit code. It is trusted; what it
// starts is not. The commands have no descriptor but their input (empty) and
// outputs.
func Inside() int {
	// It works a moment and waits a long time: no collection wakes it up.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(64 << 20)
	if err := os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"); err != nil { // it came with an empty environment
		return 1
	}
	syscall.CloseOnExec(socketFD)
	socket := os.NewFile(socketFD, "socket")
	if socket == nil {
		return 1
	}
	carryOut(order{Args: []string{"true"}, Timeout: time.Second}) // what the first command would wait for is in memory now
	if _, err := socket.Write([]byte{greeting}); err != nil {
		return 1
	}
	in, out := json.NewDecoder(socket), json.NewEncoder(socket)
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return 0
		} else if err != nil {
			return 1
		}
		if err := out.Encode(carryOut(o)); err != nil {
			return 1
		}
	}
}

func carryOut(o order) reply {
	res, err := run.Run(context.Background(), run.Cmd{Args: o.Args, Timeout: o.Timeout, OutputLimit: outputLimit})
	r := reply{Code: res.Code, Stdout: res.Stdout, Stderr: res.Stderr, Truncated: res.Truncated, Missing: errors.Is(err, run.ErrNotFound)}
	var failed *run.Error
	if errors.As(err, &failed) && r.Code <= 0 {
		r.Problem = failed.Err.Error()
	}
	return r
}

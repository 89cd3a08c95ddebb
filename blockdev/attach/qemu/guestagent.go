package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// QEMU's own guest agent speaks JSON over a port that the guest opens
// (docs/interop/qemu-ga-ref; qga/qapi-schema.json). It cannot unmount; what it can
// is freeze and thaw a filesystem, which writes all that is dirty in it. So a guest
// that has it, and not ours, loses nothing when the device goes.

const (
	agentWait = 5 * time.Second
	// agentLine bounds what is read of one answer, in bytes: a list of all of a guest's
	// filesystems. What it says is a stranger's word.
	agentLine   = 1 << 20
	mostAnswers = 16
)

var errAgent = errors.New("QEMU's guest agent does not answer as one does")

// guestAgent is a connection to it.
type guestAgent struct {
	io.Writer
	r *bufio.Reader
}

type agentAnswer struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
}

// flushInside has the filesystem of a request's volume written out in the guest, by
// QEMU's guest agent, where the target names it. Not mounted, and no answer in time,
// is nothing that a detach waits for: the device goes as without an agent.
func (a *Attacher) flushInside(ctx context.Context, r attach.Request) error {
	if r.Target.QemuAgent == "" || r.ReadOnly {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, agentWait)
	defer cancel()
	conn, err := a.o.Door.DialBeside(ctx, r.Target, "target.qemuAgent", r.Target.QemuAgent)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	g := &guestAgent{conn, bufio.NewReaderSize(conn, 4096)}
	if err := g.begin(); err != nil {
		return err
	}
	places, err := g.mountsOf(Serial(r.Volume))
	if err != nil || len(places) == 0 {
		return err
	}
	_, err = g.ask("guest-fsfreeze-freeze-list", map[string]any{"mountpoints": places})
	// Whatever became of it: a guest is not left frozen.
	_, thawed := g.ask("guest-fsfreeze-thaw", nil)
	return errors.Join(err, thawed)
}

// begin brings both sides to the beginning of a message: what an earlier client has
// left is passed over (guest-sync-delimited).
func (g *guestAgent) begin() error {
	id := rand.Int64N(1 << 52)
	if _, err := fmt.Fprintf(g, "\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}\n", id); err != nil {
		return err
	}
	for range mostAnswers {
		if err := g.skipTo(0xff); err != nil {
			return err
		}
		answer, err := g.answer()
		var got int64
		if err == nil && json.Unmarshal(answer.Return, &got) == nil && got == id {
			return nil
		}
		if err != nil && !errors.Is(err, errAgent) {
			return err
		}
	}
	return errAgent
}

func (g *guestAgent) skipTo(mark byte) error {
	for range agentLine {
		c, err := g.r.ReadByte()
		if err != nil || c == mark {
			return err
		}
	}
	return errAgent
}

// answer reads one line.
func (g *guestAgent) answer() (a agentAnswer, err error) {
	var line []byte
	for len(line) < agentLine {
		part, err := g.r.ReadSlice('\n')
		line = append(line, part...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			return a, err
		}
		if json.Unmarshal(line, &a) != nil {
			return a, errAgent
		}
		return a, nil
	}
	return a, errAgent
}

func (g *guestAgent) ask(command string, arguments any) (json.RawMessage, error) {
	text, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return nil, err
	}
	if _, err := g.Write(append(text, '\n')); err != nil {
		return nil, err
	}
	answer, err := g.answer()
	if err == nil && answer.Error != nil {
		err = fmt.Errorf("%w: %s: %.120q", blockdev.ErrBusy, command, answer.Error.Desc)
	}
	return answer.Return, err
}

// mountsOf tells where the filesystems of a disk are mounted, by its serial number.
func (g *guestAgent) mountsOf(serial string) ([]string, error) {
	said, err := g.ask("guest-get-fsinfo", nil)
	if err != nil {
		return nil, err
	}
	var all []struct {
		Mountpoint string `json:"mountpoint"`
		Disk       []struct {
			Serial string `json:"serial"`
		} `json:"disk"`
	}
	if json.Unmarshal(said, &all) != nil {
		return nil, errAgent
	}
	var places []string
	for _, f := range all {
		for _, d := range f.Disk {
			if d.Serial == serial {
				places = append(places, f.Mountpoint)
				break
			}
		}
	}
	return places, nil
}

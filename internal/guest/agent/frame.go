package agent

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Port is the name of the serial port.
const Port = "holdfast.agent"

// kind says what a frame carries.
type kind uint8

const (
	start kind = iota + 1 // to the guest: a Command as JSON
	stdin                 // to the guest: input; an empty one ends it
	kill                  // to the guest: end the command
	out                   // from the guest: output
	errs                  // from the guest: error output
	exit                  // from the guest: a Result as JSON
	hello                 // both ways: the guest is there
)

// mostPayload bounds a frame.
const mostPayload = 256 << 10

// Command is what the guest is to run.
type Command struct {
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"` // added to the guest's own
	Dir  string   `json:"dir,omitempty"`
}

// Result is how a command ended.
type Result struct {
	Code  int    `json:"code"`            // -1: it did not start, or was killed
	Error string `json:"error,omitempty"` // why
}

type frame struct {
	id   uint32
	kind kind
	data []byte
}

// write sends a frame: its command's number, kind and length, then its payload.
func (f frame) write(w io.Writer) error {
	head := make([]byte, 9, 9+len(f.data))
	binary.LittleEndian.PutUint32(head, f.id)
	head[4] = byte(f.kind)
	binary.LittleEndian.PutUint32(head[5:], uint32(len(f.data))) //nolint:gosec // bounded by its makers
	_, err := w.Write(append(head, f.data...))
	return err
}

func readFrame(r io.Reader) (frame, error) {
	var head [9]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	f := frame{id: binary.LittleEndian.Uint32(head[:]), kind: kind(head[4])}
	n := binary.LittleEndian.Uint32(head[5:])
	if n > mostPayload {
		return frame{}, fmt.Errorf("agent: a frame of %d bytes", n)
	}
	f.data = make([]byte, n)
	_, err := io.ReadFull(r, f.data)
	return f, err
}
